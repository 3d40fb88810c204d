"""Rounding in a rotated basis: nothing but rounding changes, and what is loud is spread."""

from __future__ import annotations

import pytest
import torch
from tests.solving import MakeLayer
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.kernels.embedding import PackedEmbedding
from aerogel.kernels.sidecars import SidecarLinear
from aerogel.model.layer import Layer
from aerogel.pack.config import choose_format
from aerogel.pack.scheme import Scheme
from aerogel.prune.magnitude import Magnitude
from aerogel.quantize.gptq import Gptq
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.hadamard import hadamard, inverse, random_signs
from aerogel.quantize.rotation import Mix, Rotated, Rotation
from aerogel.quantize.rtn import RoundToNearest
from aerogel.quantize.sidecars import with_sidecars
from aerogel.recipes.schema import Recipe

HADAMARD = Mix(transform="hadamard", transform_block=32)


def loud(layer: Layer) -> Layer:
    """Inputs of which a few have weights twenty times as large."""
    weight_NK = layer.weight_NK.clone()
    weight_NK[:, ::48] *= 20
    return layer.with_(weight_NK=weight_NK)


def stored(layer: Layer) -> dict[str, Tensor]:
    """Its tensors, and the codes' own among them."""
    assert layer.codes is not None
    return layer.tensors(choose_format(layer.codes.grid))


def test_the_inverse_takes_it_back() -> None:
    x, signs = torch.randn(7, 96), random_signs(96, torch.Generator().manual_seed(3))
    torch.testing.assert_close(inverse(hadamard(x, signs, 16), signs, 16), x)
    assert not torch.allclose(hadamard(x, signs, 16), x)


@pytest.mark.parametrize("method", [RoundToNearest, Gptq])
def test_the_stored_weight_is_the_layer_s_and_loud_inputs_cost_less(method: type, make_layer: MakeLayer) -> None:
    layer, grid = loud(make_layer(24, 192)), IntGrid(bits=3, group_size=64)
    plain, turned = method(grid=grid)(layer), Rotated(method=method(grid=grid), mix=HADAMARD)(layer)
    tensors = stored(turned)
    decoded = choose_format(grid).decode(tensors, grid)
    torch.testing.assert_close(with_sidecars(decoded.clone(), tensors, "a"), turned.weight_NK)
    assert not torch.allclose(decoded, turned.weight_NK)
    assert float((turned.weight_NK - layer.weight_NK).norm()) < 0.8 * float((plain.weight_NK - layer.weight_NK).norm())


def test_calibration_is_rotated_with_the_weight(make_layer: MakeLayer) -> None:
    """The loss that was found in the rotated basis is that of the weight on the inputs as they are."""
    layer = make_layer(24, 192)
    turned = Rotated(method=Gptq(grid=IntGrid(bits=4, group_size=32)), mix=HADAMARD)(layer)
    rounded = Rotated(method=RoundToNearest(grid=IntGrid(bits=4, group_size=32)), mix=HADAMARD)(layer)
    assert layer.stats is not None and layer.stats.second_moment_KK is not None and turned.loss is not None
    moment = layer.stats.second_moment_KK.double()
    wrong, right = (turned.weight_NK - layer.weight_NK).double(), layer.weight_NK.double()
    loss = float(((wrong @ moment) * wrong).sum() / ((right @ moment) * right).sum())
    assert turned.loss == pytest.approx(loss, rel=1e-3)
    assert rounded.loss is not None and turned.loss < 0.7 * rounded.loss
    assert turned.stats is layer.stats


def test_a_linear_rotates_its_inputs_and_a_tied_embedding_does_not_read_rotated_rows(make_layer: MakeLayer) -> None:
    layer, grid = make_layer(40, 192), IntGrid(bits=4, group_size=32)
    turned = Rotated(method=RoundToNearest(grid=grid), mix=HADAMARD)(layer)
    scheme, tensors = Scheme(format="pack-quantized", grid=grid), stored(turned)
    linear = SidecarLinear(192, 40, scheme, beside=tensors)
    linear.fill({name: tensor for name, tensor in tensors.items() if name.startswith("weight")})
    linear.prepare()
    x = torch.randn(2, 3, 192)
    torch.testing.assert_close(linear(x), x @ turned.weight_NK.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear.dequantize(), turned.weight_NK)
    ids = torch.tensor([5, 39])
    torch.testing.assert_close(PackedEmbedding(linear)(ids), turned.weight_NK[ids])
    before = linear.turned_before()
    assert before is not None and torch.equal(before[0], tensors["input_signs"]) and before[1] == 32


def test_linears_with_one_input_share_signs_and_damage_is_found(make_layer: MakeLayer) -> None:
    stage = Rotated(method=RoundToNearest(grid=IntGrid(bits=4)), mix=HADAMARD)
    first, second = (stage(make_layer(8, 64, seed=seed, name=str(seed))).sidecars[0] for seed in (0, 1))
    assert isinstance(first, Rotation) and isinstance(second, Rotation) and first.same(second)
    assert Rotation.below([first, second], [8, 8]) is first and Rotation.below([first, None], [8, 8]) is None
    with pytest.raises(BadInput, match="signs"):
        Rotation(signs_K=first.signs_K * 0, block_1=first.block_1).check(8, 64, "a")
    with pytest.raises(BadInput, match=r"power of two.*write transform_block: "):
        Rotation(signs_K=first.signs_K, block_1=first.block_1 * 0 + 48).check(8, 64, "a")


def test_what_does_not_go_together_is_refused_where_the_recipe_says_it(make_layer: MakeLayer) -> None:
    def recipe(**more: object) -> None:
        Recipe.load({"aerogel": 1, "stages": [{"quantize": {"method": "rtn", "bits": 4, "transform": "hadamard", **more}}]})

    recipe(activations="int8")
    for more, word in [
        ({"outliers": "sigma"}, "leave those out"),
        ({"columns": "largest"}, "leave those out"),
        ({"activations": "int8-static"}, "per token"),
        ({"transform_block": 48}, "power of two"),
        ({"format": "kmeans", "clip": "fisher"}, "another clip"),
    ]:
        with pytest.raises(BadInput, match=word):
            recipe(**more)
    stage = Rotated(method=RoundToNearest(grid=IntGrid(bits=4)), mix=HADAMARD)
    with pytest.raises(BadInput, match="rotated weights"):
        stage(Magnitude(pattern="2:4")(make_layer(8, 64)))
    with pytest.raises(BadInput, match="leave it out of the targets"):
        stage(make_layer(8, 48))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_rotates_inside_a_graph(make_layer: MakeLayer) -> None:
    layer = make_layer(64, 192)
    turned = Rotated(method=RoundToNearest(grid=IntGrid(bits=8, group_size=64)), mix=HADAMARD)(layer)
    tensors = {name: tensor.cuda() for name, tensor in stored(turned).items()}
    linear = SidecarLinear(192, 64, Scheme(format="pack-quantized", grid=IntGrid(bits=8, group_size=64)), beside=tensors)
    linear.fill({name: tensor for name, tensor in tensors.items() if name.startswith("weight")})
    linear.cuda().prepare(torch.bfloat16)
    x = torch.randn(3, 192, device="cuda").bfloat16()
    wanted = x.double() @ turned.weight_NK.cuda().double().T
    assert float((linear(x).double() - wanted).norm() / wanted.norm()) < 1.2e-2
    held, graph = torch.zeros_like(x), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(held)
    held.copy_(x)
    graph.replay()
    assert torch.equal(y, linear(x))
