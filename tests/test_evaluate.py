import torch

from distrain.evaluate import rank_of_label


def test_the_rank_of_a_label_counts_the_classes_that_score_as_high():
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    assert rank_of_label(logits, torch.tensor([0, 2, 1, 0])).tolist() == [0, 1, 2, 2]


def test_a_diverged_network_is_never_right():
    logits = torch.full((2, 3), torch.nan)
    assert rank_of_label(logits, torch.tensor([0, 1])).tolist() == [2, 2]
