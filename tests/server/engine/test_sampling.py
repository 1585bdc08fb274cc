import pytest
import torch

from errata.editor.errors import InvalidInputError
from errata.server.engine import Sampling
from errata.server.engine.sampling import Chooser, row_sampling

CPU = torch.device("cpu")


def drawn(logits: torch.Tensor, sampling: Sampling, n: int) -> torch.Tensor:
    """The tokens of n draws of one row."""
    chooser = Chooser([row_sampling(sampling, n)], [0], CPU)
    return torch.cat([chooser.choose(logits[None])[0] for _ in range(n)])


def test_draws_follow_the_distribution_at_its_temperature() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0, -torch.inf])
    for sampling in (Sampling(temperature=2, seed=1), Sampling(temperature=2, seed=1, top_k=5)):
        counts = torch.bincount(drawn(logits, sampling, 4000), minlength=5) / 4000
        torch.testing.assert_close(counts, (logits / 2).softmax(-1), rtol=0, atol=0.03)
        assert counts[4] == 0


def test_only_the_likeliest_are_drawn() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert set(drawn(logits, Sampling(seed=1, top_k=2), 200).tolist()) == {1, 3}
    assert set(drawn(logits, Sampling(seed=1, top_p=0.35), 200).tolist()) == {1}
    assert set(drawn(logits, Sampling(seed=1, top_p=0.75), 200).tolist()) == {1, 3, 2}
    assert set(drawn(logits, Sampling(seed=1, top_p=0.75, top_k=1), 50).tolist()) == {1}


def test_log_probabilities_are_of_the_unmodified_distribution() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    rules = [None, row_sampling(Sampling(temperature=0.1, top_k=1), 1), row_sampling(Sampling(temperature=0), 1)]
    tokens, log_p = Chooser(rules, [0, 0, 0], CPU).choose(logits)
    assert tokens.tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(log_p, logits.log_softmax(-1).max(-1).values)


@pytest.mark.parametrize("temperature", [1e-7, 1e-40, 5e-324])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 5e-324])
def test_a_temperature_near_zero_draws_the_likeliest(temperature: float, top_p: float) -> None:
    logits = torch.tensor([20.0, -torch.inf, 30.0, 29.9])
    assert set(drawn(logits, Sampling(temperature=temperature, top_p=top_p, seed=1), 20).tolist()) == {2}


def test_a_row_draws_on_where_it_was_when_the_batch_changes() -> None:
    logits = torch.zeros(1, 97)
    rule = row_sampling(Sampling(seed=5), 6)
    whole = drawn(logits[0], Sampling(seed=5), 6)
    later = Chooser([None, rule], [9, 3], CPU)
    assert [later.choose(logits.expand(2, -1))[0][1].item() for _ in range(3)] == whole[3:].tolist()


@pytest.mark.parametrize(
    "wrong", [{"temperature": -0.1}, {"temperature": 11.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": 0}, {"seed": -1}]
)
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError, match=f"sampling.{next(iter(wrong))}"):
        Sampling(**wrong)  # type: ignore[arg-type]
