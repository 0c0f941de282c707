"""`attach` of both methods on transformers that are not open_clip's: weights need names alone.

torchvision's vit_b_16, and VisualBERT as the library `transformers` builds it, at full size, with
random weights. VisualBERT's own benchmarks need the features of an object detector, which cannot be
had here: random ones stand in their place. So nothing is said of its accuracy.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision

import advlora
import advmask

BLOCKS, WIDTH = 12, 768
LABELS = torch.arange(8)


class VisionTransformer:
    """vit_b_16 on images of 32 pixels."""

    endings = "self_attention.in_proj_weight", "self_attention.out_proj.weight"

    def __init__(self):
        self.model = torchvision.models.vit_b_16(image_size=32, num_classes=len(LABELS)).eval()
        # torchvision's head starts at zero: no gradient would pass it
        torch.nn.init.normal_(self.model.heads.head.weight, std=0.02)
        self.x = torch.rand(len(LABELS), 3, 32, 32)

    def logits(self):
        return self.model(self.x)


class VisualBert:
    """VisualBERT for question answering: five words and four regions of an image."""

    endings = (
        "attention.self.query.weight",
        "attention.self.key.weight",
        "attention.self.value.weight",
        "attention.output.dense.weight",
    )

    def __init__(self):
        transformers = pytest.importorskip("transformers", reason="needs transformers")
        config = transformers.VisualBertConfig(num_labels=len(LABELS))
        self.model = transformers.VisualBertForQuestionAnswering(config).eval()
        self.words = torch.randint(1000, (len(LABELS), 5))
        self.regions = torch.randn(len(LABELS), 4, config.visual_embedding_dim)

    def logits(self):
        return self.model(
            input_ids=self.words,
            attention_mask=torch.ones_like(self.words),
            visual_embeds=self.regions,
            visual_attention_mask=torch.ones(len(LABELS), 4),
        ).logits


@pytest.fixture(params=[VisionTransformer, VisualBert])
def transformer(request):
    torch.manual_seed(0)
    made = request.param()
    made.model.requires_grad_(False)
    return made


def attention(transformer):
    """The names of the attention's weights in every block."""
    names = []
    for name, _ in transformer.model.named_parameters():
        if name.endswith(transformer.endings):
            names.append(name)
    return names


def loss_of(transformer):
    return F.cross_entropy(transformer.logits(), LABELS)


def check_ordinary(transformer, before, names):
    """The merged model has its own parameters and no others; of these the named ones changed."""
    after = transformer.model.state_dict()
    assert set(after) == set(before)
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert changed
    assert set(changed) <= set(names)
    again = copy.deepcopy(transformer)
    again.model.load_state_dict(after)
    torch.testing.assert_close(again.logits(), transformer.logits())


def test_a_step_of_masks_lowers_the_loss_and_merges_into_an_ordinary_model(transformer):
    before = copy.deepcopy(transformer.model.state_dict())
    names = attention(transformer)
    with torch.no_grad():
        plain = transformer.logits()
    masks = advmask.attach(transformer.model, names)
    # q, k, v and the output: 4 d^2 in every block, the published number of ViT-B/32
    assert sum(mask.M.numel() for mask in masks.values()) == 4 * BLOCKS * WIDTH**2 == 28_311_552
    with torch.no_grad():
        torch.testing.assert_close(transformer.logits(), plain)

    # M <- M - gamma g, so that the 283 entries with the largest gradients, 1 in 100,000, go off
    loss = loss_of(transformer)
    M = [mask.M for mask in masks.values()]
    gradients = torch.autograd.grad(loss, M)
    last = torch.cat([g.flatten() for g in gradients]).topk(284).values[-1]
    with torch.no_grad():
        for m, g in zip(M, gradients):
            m.sub_((1e-2 - 5e-3) / last * g)
        assert sum((~mask.kept()).sum() for mask in masks.values()) in (283, 284)
        assert loss_of(transformer) < loss - 0.05

        masked = transformer.logits()
        advmask.merge(transformer.model, masks)
        torch.testing.assert_close(transformer.logits(), masked)
        check_ordinary(transformer, before, names)


def test_a_step_of_lora_lowers_the_loss_and_merges_into_an_ordinary_model(transformer):
    before = copy.deepcopy(transformer.model.state_dict())
    names = attention(transformer)
    with torch.no_grad():
        plain = transformer.logits()
    # the start by SVD is quicker than k-means
    loras = advlora.attach(transformer.model, names, rank=4, init="svd")
    trained = sum(p.numel() for lora in loras.values() for p in lora.parameters())
    # A (r, d) and B (d, r) of q, k, v and the output, and a scale of each
    assert trained == 4 * BLOCKS * (2 * 4 * WIDTH + 1)
    with torch.no_grad():
        torch.testing.assert_close(transformer.logits(), plain, rtol=1e-3, atol=1e-4)

    # AdamW's first step at the program's rate
    loss = loss_of(transformer)
    factors = [p for lora in loras.values() for p in lora.parameters()]
    optimizer = torch.optim.AdamW(factors, lr=1e-3, weight_decay=0)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert loss_of(transformer) < loss - 0.1

        adapted = transformer.logits()
        advlora.merge(transformer.model, loras)
        torch.testing.assert_close(transformer.logits(), adapted, rtol=1e-3, atol=1e-4)
        check_ordinary(transformer, before, names)
