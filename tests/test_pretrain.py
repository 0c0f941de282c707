"""tiny/pretrain.py: other widths of the small CLIP, and the folder that holds one."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

import common
from tiny import pretrain

HERE = pathlib.Path(__file__).resolve().parent.parent


def test_the_usual_width_is_the_configuration_of_the_small_clip():
    assert pretrain.configure(192) == json.loads((HERE / "tiny/open_clip_config.json").read_text())


@pytest.mark.parametrize("width", [96, 288])
def test_another_width_is_a_folder_that_the_programs_take(tmp_path, width):
    config = pretrain.configure(width)
    made = pretrain.build(config, 64).eval()
    pretrain.store(tmp_path / "wide", config, made.state_dict())
    clip, found = common.load_clip(f"local-dir:{tmp_path / 'wide'}", "none")
    assert found["model_cfg"] == config["model_cfg"]
    blocks = clip.visual.transformer.resblocks
    assert (len(blocks), clip.visual.transformer.width, blocks[0].attn.num_heads) == (6, width, 3)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_image(x), made.encode_image(x))
    assert sorted(path.name for path in (tmp_path / "wide").iterdir()) == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]


def test_a_batch_mixes_the_sources_and_every_image_keeps_its_text():
    # photograph k is k everywhere, its text id k + 1; garment k is of the class k % 10
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 64, 64)
    pools = {
        "tiny": torch.tensor([0, 1]),
        "caltech": torch.tensor([2, 3]),
        "flickr": torch.arange(4, 6),
    }
    texts = [["a"], ["b"], ["c"], ["d"], ["e"], *[[name] for name in pretrain.FASHION]]
    garments = np.repeat(np.arange(20, dtype=np.uint8), 28 * 28).reshape(20, 28, 28)
    labels = np.arange(20) % 10
    ids = torch.arange(1, 7)
    data = pretrain.Data(images, torch.zeros(6, 1), ids, pools, texts, 5, garments, labels)
    counts = {"tiny": 3, "caltech": 2, "flickr": 4, "fashion": 5}
    pictures, y, picks = pretrain.draw(data, counts, 7)
    assert pictures.shape == (14, 3, 64, 64) and len(picks) == 9
    shown = pictures[:, 0, 0, 0].long()
    assert torch.equal(shown[:9], picks) and torch.equal(y[:9], picks + 1)
    assert torch.equal(y[9:], 5 + shown[9:] % 10)
    sources = [set(picks[:3].tolist()), set(picks[3:5].tolist()), set(picks[5:].tolist())]
    assert all(source <= set(pool.tolist()) for source, pool in zip(sources, pools.values()))


def test_every_class_has_a_prompt_and_only_captions_of_the_batch_are_read():
    texts = [["cat"], *[[name] for name in pretrain.FASHION], ["first"], ["second"], ["third"]]
    data = pretrain.Data(None, None, None, None, texts, 1, None, None)
    prompts, ids = pretrain.draw_prompts(data, torch.tensor([13, 0, 11, 13]))
    assert ids.tolist() == [*range(12), 13]
    assert prompts[-2:] == ["first", "third"], "a caption stands as it is"
    assert all(name[0] in prompt for name, prompt in zip(texts, prompts[:-2]))


def test_a_killed_training_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    texts = [["cat"], *[[name] for name in pretrain.FASHION], ["a caption"]]
    images = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    pools = {"tiny": torch.tensor([0]), "caltech": torch.tensor([1]), "flickr": torch.tensor([2])}
    garments = np.zeros((10, 28, 28), dtype=np.uint8), np.arange(10)
    ids = torch.tensor([0, 0, 11])
    data = pretrain.Data(images, torch.ones(3, 1280), ids, pools, texts, 1, *garments)
    words = ["--data-root", str(tmp_path), "--batch-size", "12", "--stages", "32:2", "32:3"]
    args = pretrain.parser.parse_args([*words, "--device", "cpu"])
    config = pretrain.configure(96)
    tokenizer = common.tokenizer_of(config)
    checkpoint = tmp_path / "checkpoint.pt"
    drawn = []
    plain = pretrain.draw

    def draw(data, counts, number):
        drawn.append(number)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return plain(data, counts, number)

    monkeypatch.setattr(pretrain, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train(args, config, data, tokenizer, 0, checkpoint)
    reached = torch.load(checkpoint)
    assert (reached["stage"], reached["step"], drawn) == (0, 2, [0, 1, 2, 3])

    state, seen, _ = pretrain.train(args, config, data, tokenizer, 0, checkpoint)
    assert drawn[4:] == [2, 3, 4], "the second stage alone is trained again"
    assert torch.load(checkpoint)["step"] == 3 and seen.any()
    again, _, _ = pretrain.train(args, config, data, tokenizer, 0, checkpoint)
    assert len(drawn) == 7 and all(torch.equal(again[name], state[name]) for name in state)

    args.lr = 1e-2
    with pytest.raises(common.Fault, match="was made with other arguments"):
        pretrain.train(args, config, data, tokenizer, 0, checkpoint)


def test_a_width_that_three_heads_cannot_share_is_refused(tmp_path):
    command = [sys.executable, HERE / "tiny/pretrain.py", "--data-root", tmp_path, "--width", "100"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].endswith("the image tower has 3 heads")
    assert "Traceback" not in ended.stderr


def test_stages_that_end_at_another_size_are_refused_before_anything_is_written(
    monkeypatch, capsys
):
    words = ["pretrain.py", "--data-root", "nowhere", "--stages", "32:2", "48:1"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(pretrain, "write_embedded", lambda *_: pytest.fail("it writes"))
    with pytest.raises(SystemExit, match="2"):
        pretrain.main()
    assert "the last of --stages must be 64:STEPS" in capsys.readouterr().err


def test_a_cache_of_other_images_is_refused(monkeypatch, tmp_path):
    def listed(*names):
        items = [(tmp_path / name, "flickr", 0) for name in names]
        monkeypatch.setattr(pretrain, "captioned_photographs", lambda _: (items, [["a"]], 1))
        args = pretrain.parser.parse_args(["--data-root", str(tmp_path), "--no-teacher"])
        args.work = tmp_path
        return args

    def decode(items, *_):
        return torch.zeros(len(items), 3, 64, 64, dtype=torch.uint8), torch.rand(len(items), 4)

    monkeypatch.setattr(pretrain, "decode", decode)
    monkeypatch.setattr(pretrain, "idx_images", lambda *_: (None, None))
    data, _ = pretrain.load_data(listed("1.jpg", "2.jpg", "3.jpg"))
    assert len(data.images) == 3
    assert len(pretrain.load_data(listed("1.jpg", "2.jpg", "3.jpg"))[0].images) == 3
    with pytest.raises(common.Fault, match="holds other images"):
        pretrain.load_data(listed("1.jpg", "2.jpg", "4.jpg"))
