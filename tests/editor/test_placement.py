"""Devices and dtypes that are not there: said before anything is loaded, with those that are."""

import pytest
import torch

from errata.editor.checkpoints import ATLAS, load_model
from errata.editor.errors import InvalidInputError
from errata.editor.placement import checked_device, checked_dtype, devices

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["cpu", "cpu:0", torch.device("cpu")])
def test_the_cpu_is_always_there(name: str | torch.device) -> None:
    assert checked_device(name).type == "cpu"
    assert devices()[0] == "cpu"


@pytest.mark.parametrize("name", ["cuda:97", "xpu:97", "cpu:1", "meta", "opengl"])
def test_a_device_that_this_machine_lacks_is_refused_with_those_it_has(name: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"device: this machine has no device '{name}'; use cpu"):
        load_model(ATLAS, device=name)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is one")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "xpu"])
def test_an_accelerator_is_refused_where_there_is_none(name: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"device: this machine has no device '{name}'; use cpu"):
        load_model(ATLAS, device=name)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:-1", "cuda:x", "CUDA", "../cpu"])
def test_what_is_no_device_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(InvalidInputError, match=r"device: .* is no device; use cpu"):
        load_model(ATLAS, device=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_cpu_computes_in_every_dtype_that_models_are_run_in(dtype: torch.dtype) -> None:
    assert checked_dtype(dtype, CPU) is dtype
    assert checked_dtype(str(dtype).removeprefix("torch."), CPU) is dtype


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "flaot32", "", torch.float8_e5m2, torch.int32, "fp16"])
def test_what_is_no_dtype_for_a_model_is_refused_with_those_there_are(dtype: str | torch.dtype) -> None:
    with pytest.raises(InvalidInputError, match=r"dtype: .* is no dtype that a model is run in; use float32, bfloat16"):
        load_model(ATLAS, dtype=dtype)


def test_a_dtype_that_a_device_lacks_is_refused_with_those_it_has() -> None:
    """The meta device computes nothing, so it lacks them as a GPU without float64 does."""
    with pytest.raises(InvalidInputError, match=r"dtype: meta does not compute in float64; use another device"):
        checked_dtype("float64", torch.device("meta"))
