"""Keys of what was edited earlier: from disk where they are the base's, else from the model, the same either way."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from tiny import context, picture, random_delta, tiny_model
from torch import Tensor

from errata.editor.delta import applied
from errata.editor.earlier import Earlier, EarlierRequest
from errata.editor.errors import ConstraintNotFoundError, MemoryLimitError
from errata.editor.memory import Memory
from errata.editor.model import EditableModel
from errata.editor.prompts import Constraint
from errata.editor.requests import Context, EditRequest

TEXTS = ("What is the capital of this country?", "Where is this country?", "And this country, what is it?")


def request(model: EditableModel, name: str = "italy", seed: int = 0) -> EditRequest:
    """Two contexts of different lengths."""
    contexts = tuple(context(model, text, seed=seed + i) for i, text in enumerate(TEXTS[1:]))
    return EditRequest(name=name, contexts=contexts, target="Rome")


def found(earlier: Earlier, model: EditableModel, layer: int = 1, *, of_base: bool = True) -> list[Tensor]:
    return list(earlier.keys(model, layer, of_base=of_base))


def equal(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    return len(one) == len(two) and all(a.equal(b) for a, b in zip(one, two, strict=True))


class UnopenedError(Exception):
    """Contexts were made that nobody needed."""


def unopened(earlier: Earlier) -> Earlier:
    """The same requests, whose contexts cannot be made."""

    def fail() -> Sequence[Context]:
        raise UnopenedError

    return replace(earlier, requests=tuple(replace(r, contexts=fail) for r in earlier.requests))


def test_keys_are_those_of_the_constraints_and_no_layer_above_is_run(model: EditableModel) -> None:
    own, above = request(model), []
    with ExitStack() as hooks:
        for layer in model.layers[2:]:
            hooks.callback(layer.register_forward_pre_hook(lambda *_: above.append(1)).remove)
        keys = found(Earlier.of([own]), model)
    assert above == []
    rows = [model.encode_at(c, field="context") for c in own.contexts]
    expected = torch.stack([oracle.keys(model, row, 1)[end] for row, end in rows], dim=1)
    assert keys[0].dtype == torch.float64
    torch.testing.assert_close(keys[0], expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_kept_keys_are_the_computed_ones_bit_for_bit_without_a_run_or_a_picture(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    model = tiny_model("llava")
    model.model.to(dtype)
    requests = [request(model, str(n), 10 * n) for n in range(3)]
    computed = found(Earlier.of(requests), model)
    assert equal(found(Earlier.of(requests, tmp_path), model), computed)
    assert len(list(tmp_path.iterdir())) == 3
    assert equal(found(unopened(Earlier.of(requests, tmp_path)), model), computed)


def _cut(data: bytes) -> bytes:
    return data[:-5]


def _flipped(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"not safetensors", _cut, _flipped])
def test_a_damaged_file_is_computed_and_written_anew(
    llama: EditableModel, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    earlier = Earlier.of([request(llama)], tmp_path)
    first = found(earlier, llama)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UnopenedError):
        found(unopened(earlier), llama)
    assert equal(found(earlier, llama), first)
    assert equal(found(unopened(earlier), llama), first)


def test_keys_are_kept_by_weights_dtype_template_layer_and_what_the_contexts_ask(
    llava: EditableModel, tmp_path: Path
) -> None:
    one = request(llava)
    first, *rest = one.contexts
    narrow, worded = tiny_model("llava"), tiny_model("llava")
    narrow.model.to(torch.bfloat16)
    worded.processor.chat_template = f"Asked: {worded.processor.chat_template}"

    def with_first(**own: object) -> EditRequest:
        return replace(one, contexts=(replace(first, **own), *rest))

    found(Earlier.of([one], tmp_path), llava)
    others = [
        (tiny_model("llava", seed=1), one, 1),
        (narrow, one, 1),
        (worded, one, 1),
        (llava, one, 0),
        (llava, with_first(prompt=replace(first.prompt, images=(picture(9),))), 1),
        (llava, with_first(prompt=replace(first.prompt, text="Who is this country?")), 1),
        (llava, with_first(prompt=replace(first.prompt, chat=False)), 1),
        (llava, with_first(constraint=Constraint(text="country")), 1),
        (llava, replace(one, contexts=(first,)), 1),
    ]
    for model, other, layer in others:
        with pytest.raises(UnopenedError):
            found(unopened(Earlier.of([other], tmp_path)), model, layer)
        found(Earlier.of([other], tmp_path), model, layer)
    assert len(list(tmp_path.iterdir())) == 1 + len(others)
    same = replace(with_first(answer="Rome", subject="Italy"), name="again", target="Paris")
    found(unopened(Earlier.of([same], tmp_path)), llava)


def test_where_something_below_is_edited_nothing_kept_is_read_and_nothing_is_kept(
    model: EditableModel, tmp_path: Path
) -> None:
    own = request(model)
    earlier = Earlier.of([own], tmp_path)
    of_base = found(earlier, model)
    with applied(model, random_delta(model, {0: 2})):
        edited = found(earlier, model, of_base=False)
        assert equal(edited, found(Earlier.of([own]), model))
        rows = [model.encode_at(c, field="context") for c in own.contexts]
        expected = torch.stack([oracle.keys(model, row, 1)[end] for row, end in rows], dim=1)
    torch.testing.assert_close(edited[0], expected.double(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(edited[0], of_base[0], rtol=1e-2)
    assert equal(found(unopened(earlier), model), of_base)


def test_many_requests_come_in_order_and_a_few_at_a_time(llama: EditableModel, tmp_path: Path) -> None:
    opened: list[int] = []

    def asked(n: int) -> EarlierRequest:
        own = context(llama, f"Where, {'very ' * (n % 5)}number {n} is this country?")

        def contexts() -> Sequence[Context]:
            opened.append(n)
            return (own,)

        return EarlierRequest(name=str(n), subjects=frozenset(), contexts=contexts)

    earlier = Earlier(requests=tuple(asked(n) for n in range(40)), folder=tmp_path)
    keys = earlier.keys(llama, 1, of_base=True)
    first = next(keys)
    assert opened == list(range(16))
    together = [first, *keys]
    assert opened == list(range(40))
    alone = [found(replace(earlier, requests=(r,), folder=None), llama)[0] for r in earlier.requests]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_what_was_kept_before_an_interruption_is_not_computed_again(llama: EditableModel, tmp_path: Path) -> None:
    requests = [request(llama, str(n), n) for n in range(20)]
    for i, r in enumerate(requests):
        requests[i] = replace(r, contexts=(context(llama, f"Is number {i} this country?"),))
    next(Earlier.of(requests, tmp_path).keys(llama, 1, of_base=True))
    kept = len(list(tmp_path.iterdir()))
    assert 0 < kept < 20
    found(unopened(Earlier.of(requests[:kept], tmp_path)), llama)
    assert len(found(Earlier.of(requests, tmp_path), llama)) == 20


def test_a_request_that_cannot_be_read_leaves_no_hook_and_says_that_it_is_an_earlier_one(llama: EditableModel) -> None:
    wrong = context(llama)
    object.__setattr__(wrong, "constraint", Constraint(text="Atlantis"))
    earlier = EarlierRequest(name="wrong", subjects=frozenset(), contexts=lambda: (wrong,))
    with pytest.raises(ConstraintNotFoundError) as raised:
        found(Earlier(requests=(earlier,)), llama)
    assert (raised.value.field or "").startswith("earlier")


@pytest.mark.parametrize("free_rows", [1, 3])
def test_batches_are_cut_to_what_memory_holds_and_where_not_one_context_fits_that_is_said(
    llama: EditableModel, free_rows: int
) -> None:
    own = context(llama)
    earlier = Earlier.of([EditRequest(name=str(n), contexts=(own,), target="Rome") for n in range(8)])
    row_bytes, rows = len(llama.encode(own.prompt).ids) * llama.token_bytes, []
    handle = llama.layers[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        memory = Memory(free=lambda: int(1.3 * free_rows * row_bytes))
        cut = list(earlier.keys(llama, 1, of_base=True, memory=memory))
    finally:
        handle.remove()
    assert sum(rows) == 8
    assert max(rows) == free_rows
    for one, whole in zip(cut, found(earlier, llama), strict=True):
        torch.testing.assert_close(one, whole, rtol=1e-5, atol=1e-6)
    with pytest.raises(MemoryLimitError):
        next(earlier.keys(llama, 1, of_base=True, memory=Memory(free=lambda: 1)))


def test_keys_that_cannot_be_written_are_computed_with_one_warning(
    llama: EditableModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "keys").write_text("a file where the folder would be")
    requests = [
        EditRequest(name=str(n), contexts=(context(llama, f"Is number {n} this country?"),), target="Rome")
        for n in range(20)
    ]
    computed = found(Earlier.of(requests), llama)
    assert equal(found(Earlier.of(requests, tmp_path / "keys"), llama), computed)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "cannot be written" in caplog.text
