"""Heads on packed pictures: the convolution is torch's own, and pictures do not see each other."""

import torch

from kontext_train.models.config import FluxConfig, InitConfig
from kontext_train.models.discriminator import Convolution, Discriminator, Head, neighbours
from kontext_train.models.sequence import SampleShape
from kontext_train.models.weights import initialise

SHAPES = [SampleShape(4, (3, 5)), SampleShape(4, (1, 1)), SampleShape(4, (2, 4))]
TOKENS = [15, 1, 8]


def test_the_convolution_is_torchs_on_every_picture_of_a_pack() -> None:
    convolution = Convolution(channels=6)
    x_MC = torch.randn(sum(TOKENS), 6)
    ours = convolution(x_MC, neighbours(SHAPES)).split(TOKENS)
    kernel = convolution.linear.weight.view(6, 9, 6).permute(0, 2, 1).reshape(6, 6, 3, 3)
    for (h, w), x, y in zip((s.target for s in SHAPES), x_MC.split(TOKENS), ours, strict=True):
        theirs = torch.conv2d(x.T.view(1, 6, h, w), kernel, convolution.linear.bias, padding=1)
        torch.testing.assert_close(y.T.view(1, 6, h, w), theirs)


def judged(model: Discriminator, features: list[torch.Tensor], chosen: list[int]) -> list[torch.Tensor]:
    """Logits of some of the samples, in one pack."""
    parts = [[f.split(TOKENS)[i] for i in chosen] for f in features]
    own_M = torch.cat([torch.full((TOKENS[i],), place) for place, i in enumerate(chosen)])
    t_S, vec_SP = torch.tensor([0.1, 0.5, 0.9])[chosen], torch.eye(3)[chosen]
    logits_HM = model([torch.cat(p) for p in parts], t_S, vec_SP, own_M, neighbours([SHAPES[i] for i in chosen]))
    return list(logits_HM.split([TOKENS[i] for i in chosen], dim=1))


def small() -> Discriminator:
    model = Discriminator(heads=2, hidden=8, channels=6, pooled=3)
    initialise(model, InitConfig(), seed=0)
    for embedder in (model.time_in, model.vector_in):  # they start small, as FLUX's do
        torch.nn.init.normal_(embedder.out_layer.weight)
    return model


def test_a_head_has_a_path_around_its_convolutions() -> None:
    """With convolutions that say nothing its verdict is linear in what it reads, after the nonlinearity."""
    model, x_MD = small(), torch.randn(15, 8)
    head = model.heads[0]
    assert isinstance(head, Head)
    for convolution in (head.conv1, head.conv2):
        torch.nn.init.zeros_(convolution.linear.weight)
    torch.nn.init.zeros_(head.steer.weight)
    around, own, vec = neighbours(SHAPES[:1]), torch.zeros(15, dtype=torch.long), torch.eye(3)[:1]
    found = model([x_MD, x_MD], torch.tensor([0.5]), vec, own, around)[0]
    expected = head.verdict(torch.nn.functional.silu(head.read(torch.nn.LayerNorm(8, elementwise_affine=False)(x_MD))))
    torch.testing.assert_close(found, expected[:, 0], atol=1e-4, rtol=1e-4)
    assert found.std() > 1e-2


def test_samples_of_a_pack_are_judged_as_if_each_were_alone() -> None:
    model, features = small(), [torch.randn(sum(TOKENS), 8) for _ in range(2)]
    together = judged(model, features, [0, 1, 2])
    assert [t.shape for t in together] == [(2, n) for n in TOKENS]
    for i in range(3):
        torch.testing.assert_close(judged(model, features, [i])[0], together[i])
    assert not torch.equal(judged(model, features, [2, 1, 0])[0][:, :1], together[0][:, :1])


def test_the_verdict_depends_on_time_and_prompt() -> None:
    model, x = small(), torch.randn(15, 8)
    around, own = neighbours(SHAPES[:1]), torch.zeros(15, dtype=torch.long)

    def verdict(t: float, prompt: int) -> torch.Tensor:
        return model([x, x], torch.tensor([t]), torch.eye(3)[[prompt]], own, around)

    assert (verdict(0.2, 0) - verdict(0.8, 0)).abs().max() > 1e-3
    assert (verdict(0.2, 0) - verdict(0.2, 1)).abs().max() > 1e-3


def test_the_12b_heads_are_small_beside_it() -> None:
    with torch.device("meta"):
        model = Discriminator(heads=6, hidden=FluxConfig().hidden_size, channels=256, pooled=768)
    assert sum(p.numel() for p in model.parameters()) < 0.001 * 11.9e9 + 4e6
