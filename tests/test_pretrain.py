"""tiny/pretrain.py: other widths of the small CLIP, and the folder that holds one."""

import json
import pathlib
import subprocess
import sys

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


def test_a_width_that_three_heads_cannot_share_is_refused(tmp_path):
    command = [sys.executable, HERE / "tiny/pretrain.py", "--data-root", tmp_path, "--width", "100"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].endswith("the image tower has 3 heads")
    assert "Traceback" not in ended.stderr
