import torch
from hypothesis import given
from hypothesis import strategies as st

from colorfilter.scoring.labels import IGNORED, mean_over_labels, shifted_labels


def test_labels_are_the_following_tokens_of_the_real_part() -> None:
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0], [5, 0, 0, 0]])
    labels = shifted_labels(tokens, torch.tensor([4, 2, 1]))
    x = IGNORED
    assert labels.tolist() == [[6, 7, 8, x], [6, x, x, x], [x, x, x, x]]
    assert tokens.tolist() == [[5, 6, 7, 8], [5, 6, 0, 0], [5, 0, 0, 0]]


@given(st.integers(1, 12), st.lists(st.integers(0, 12), min_size=1, max_size=5))
def test_a_sequence_has_one_label_less_than_real_tokens(length: int, sizes: list[int]) -> None:
    n_tokens = torch.tensor([min(n, length) for n in sizes])
    tokens = torch.arange(len(sizes) * length).view(len(sizes), length)
    labels = shifted_labels(tokens, n_tokens)
    assert (labels != IGNORED).sum(1).tolist() == [max(0, n - 1) for n in n_tokens.tolist()]
    for b, n in enumerate(n_tokens.tolist()):
        if n > 1:
            assert labels[b, : n - 1].tolist() == tokens[b, 1:n].tolist()


def test_the_mean_is_over_the_labels_alone_whatever_stands_beside_them() -> None:
    nll = torch.tensor([[1.0, 3.0, torch.nan], [5.0, torch.inf, 7.0], [1.0, 1.0, 1.0]])
    labels = torch.tensor([[0, 2, IGNORED], [1, 1, IGNORED], [IGNORED] * 3])
    mean, n = mean_over_labels(nll, labels)
    assert mean[0] == 2.0
    assert mean[1].isinf()
    assert mean[2].isnan()
    assert n.tolist() == [2, 2, 0]


def test_labels_behind_the_end_of_a_document_can_be_left_out() -> None:
    end, x = 9, IGNORED
    tokens = torch.tensor([[5, end, 7, 8], [end, end, 6, end], [end, 9, 0, 0]])
    labels = shifted_labels(tokens, torch.tensor([4, 4, 2]), eot_id=end)
    assert labels.tolist() == [[end, x, 8, x], [x, x, end, x], [x, x, x, x]]
