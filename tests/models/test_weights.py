"""Weights from files: strict, by rows, with the guidance embedding and the dtype that the config and the file say."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from kontext_train.distributed.config import ParallelConfig
from kontext_train.distributed.parallelize import parallelize
from kontext_train.distributed.setup import process_group
from kontext_train.models.config import FluxConfig, GuidanceIn
from kontext_train.models.diffusers_format import to_diffusers
from kontext_train.models.flux import Flux
from kontext_train.models.kontext import predict_velocity
from kontext_train.models.safetensors_files import Spec, plan_files, weight_files, write_files
from kontext_train.models.weights import load
from tests.models.flux_cases import SHAPES, TINY, pack, random_flux, random_sample
from tests.runs import in_processes


def tensors_of(model: Flux) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def refused(file: Path, changed: Mapping[str, Tensor], message: str, choice: GuidanceIn = GuidanceIn.require) -> None:
    save_file(dict(changed), file)
    untouched = random_flux()
    before = tensors_of(untouched)
    with pytest.raises(ValueError, match=message):
        load(untouched, file, choice)
    assert all(torch.equal(p, before[name]) for name, p in untouched.named_parameters())


def test_loading_is_strict_both_ways(tmp_path: Path) -> None:
    tensors = tensors_of(random_flux())
    file = tmp_path / "w.safetensors"
    refused(file, {k: v for k, v in tensors.items() if k != "img_in.bias"}, r"1 missing, first \['img_in\.bias'\]")
    refused(
        file, tensors | {"img_in.extra": torch.ones(3)}, r"1 left over, first \['img_in\.extra'\]\. Check model\.de"
    )
    refused(file, tensors | {"img_in.bias": torch.ones(3)}, r"img_in\.bias: shape \(3,\) does not fit.*\(48,\)")
    refused(file, tensors | {"img_in.bias": torch.ones(48, dtype=torch.int8)}, r"img_in\.bias: holds integers")
    refused(file, tensors | {"decoder.x": torch.ones(1)}, "An autoencoder is among them")
    refused(file, {"single_blocks.0.linear1.lora_A.weight": torch.ones(1)}, "This is a LoRA")
    save_file(tensors, file)
    other = random_flux()
    load(other, file)
    assert all(torch.equal(p, tensors[name]) for name, p in other.named_parameters())


def test_files_that_cannot_be_right_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing: no safetensors file there"):
        load(random_flux(), tmp_path / "nothing")
    file = tmp_path / "w.safetensors"
    save_file(tensors_of(random_flux()), file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"w\.safetensors: is not a whole safetensors file"):
        load(random_flux(), file)
    file.write_bytes(whole)
    (tmp_path / "copy.safetensors").write_bytes(whole)
    with pytest.raises(ValueError, match=r"w\.safetensors: .* is in another file of the folder too"):
        load(random_flux(), tmp_path)
    for variant in ("", ".fp16"):
        (tmp_path / f"w{variant}.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match="holds several indexes"):
        load(random_flux(), tmp_path)


def test_an_added_guidance_embedding_says_nothing_and_learns(tmp_path: Path) -> None:
    file = tmp_path / "schnell.safetensors"
    without, with_it = random_flux(), random_flux(guidance_embed=True)
    save_file(tensors_of(without), file)
    load(with_it, file, GuidanceIn.add)
    samples = [random_sample(s) for s in SHAPES]
    out = predict_velocity(with_it, *pack(samples, guidance=True))
    assert torch.equal(out, predict_velocity(without, *pack(samples)))
    for _ in range(2):  # the first step moves the last layer, the second what is before it
        with_it.zero_grad()
        predict_velocity(with_it, *pack(samples, guidance=True)).square().mean().backward()
        with torch.no_grad():
            for p in with_it.parameters():
                p.sub_(0.1 * p.grad)
    assert with_it.guidance_in is not None
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in with_it.guidance_in.parameters())
    assert not torch.equal(predict_velocity(with_it, *pack(samples, guidance=True)), out)


def test_a_dropped_guidance_embedding_is_all_that_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "dev.safetensors"
    with_it, without = random_flux(guidance_embed=True), random_flux()
    save_file(tensors_of(with_it), file)
    load(without, file, GuidanceIn.drop)
    kept = {name: t for name, t in tensors_of(with_it).items() if not name.startswith("guidance_in.")}
    assert tensors_of(without).keys() == kept.keys()
    assert all(torch.equal(t, kept[name]) for name, t in tensors_of(without).items())


def test_guidance_that_file_and_model_disagree_on_names_the_option(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    plain, guided = tensors_of(random_flux()), tensors_of(random_flux(guidance_embed=True))
    refused(file, guided, r"has guidance_in and model\.guidance_embed=false.*weights\.guidance_in=drop leaves it out")
    refused(file, plain, r"guidance_in=drop does not allow\. They agree", GuidanceIn.drop)
    refused(file, guided, r"guidance_in=add does not allow\. weights\.guidance_in=drop", GuidanceIn.add)
    save_file(plain, file)
    with pytest.raises(ValueError, match=r"has no guidance_in and model\.guidance_embed=true.*guidance_in=add adds"):
        load(random_flux(guidance_embed=True), file)
    partly = {k: v for k, v in guided.items() if k != "guidance_in.in_layer.bias"}
    save_file(partly, file)
    with pytest.raises(ValueError, match=r"1 missing, first \['guidance_in\.in_layer\.bias'\]"):
        load(random_flux(guidance_embed=True), file)


def test_float8_is_read_with_and_without_scales(tmp_path: Path) -> None:
    """A plain cast has no scale; one scale that is ignored must show."""
    model = random_flux()
    tensors = tensors_of(model)
    name = "double_blocks.0.img_attn.qkv.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "cast.safetensors")
    load(model, tmp_path / "cast.safetensors")
    assert torch.equal(model.get_parameter(name), tensors[name].float())
    scale = {f"{name.removesuffix('.weight')}.scale_weight": torch.tensor(0.25)}
    save_file(tensors | scale | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "s.safetensors")
    load(model, tmp_path / "s.safetensors")
    assert torch.equal(model.get_parameter(name), tensors[name].float() / 4)
    refused(tmp_path / "x.safetensors", tensors | {"img_in.scale_input": torch.ones(1)}, "1 left over")


def check_own_rows(files: list[Path], config: FluxConfig, sizes: dict[str, int]) -> None:
    expected = load_file(files[0])
    with process_group(ParallelConfig(**sizes)) as world:  # type: ignore[arg-type]
        for file in files:
            with torch.device("meta"):
                model = Flux(config)
            parallelize(model, world.mesh, ParallelConfig())
            model.to_empty(device="cpu")
            load(model, file)
            for name, parameter in model.named_parameters():
                assert isinstance(parameter, DTensor)
                assert torch.equal(parameter.full_tensor(), expected[name]), (file, name)


@pytest.mark.parametrize(("ranks", "sizes"), [(3, {}), (4, {"dp_replicate": 2})], ids=["uneven", "hsdp"])
def test_every_rank_reads_its_rows(tmp_path: Path, ranks: int, sizes: dict[str, int]) -> None:
    """Of both layouts. Three ranks cut q, k, v and MLP at other rows than they meet at, and 16 rows unevenly."""
    config = replace(TINY, guidance_embed=True, mlp_ratio=2.5)
    tensors = tensors_of(random_flux(config))
    files = [tmp_path / "released.safetensors", tmp_path / "diffusers.safetensors"]
    save_file(tensors, files[0])
    save_file({n: t for name, tensor in tensors.items() for n, t in to_diffusers(name, tensor, 48).items()}, files[1])
    in_processes(ranks, check_own_rows, files, config, sizes)


def test_planned_files_are_full_and_no_fuller() -> None:
    specs = [Spec(name, (size,), torch.float32) for name, size in (("a", 2), ("b", 2), ("c", 9), ("d", 1), ("e", 3))]
    plan = plan_files(specs, "model", 16)
    assert [[s.name for s in part] for part in plan.values()] == [["a", "b"], ["c"], ["d", "e"]]
    assert next(iter(plan)) == "model-00001-of-00003.safetensors"
    assert list(plan_files(specs, "model", None)) == list(plan_files(specs, "model", 68)) == ["model.safetensors"]


def test_files_are_written_in_any_order_and_aligned(tmp_path: Path) -> None:
    """An odd number of bytes before a wider type would leave it where it cannot be viewed."""
    tensors = {
        "odd": torch.ones(3).to(torch.float8_e4m3fn),
        "half": torch.arange(5).bfloat16(),
        "scalar": torch.tensor(2.5),
        "strided": torch.arange(6.0).view(2, 3).T,
    }
    plan = plan_files([Spec.of(n, t) for n, t in tensors.items()], "w", None)
    write_files(tmp_path, plan, reversed(tensors.items()), {"about": "this"})
    read = load_file(tmp_path / "w.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype is tensor.dtype
        assert torch.equal(read[name].float(), tensor.float())
    with pytest.raises(AssertionError, match=r"planned but never came: \['odd'\]"):
        write_files(tmp_path, plan, list(tensors.items())[1:], {})
    with pytest.raises(AssertionError, match="half is not what was planned"):
        write_files(tmp_path, plan, [("half", torch.ones(5))], {})


@pytest.mark.parametrize("index", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_named(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(
        ValueError, match=r"model\.safetensors\.index\.json: is no index of safetensors files .*Fetch it"
    ):
        weight_files(tmp_path)
