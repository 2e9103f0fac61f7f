"""When a trial is measured, how its learning rate moves, and the mean of its last weights."""

import pytest
import torch
from tiny import tiny_llama

from kd_utils.distill import schedules


def ends(steps, evaluations):
    return [stretch.stop for stretch in schedules.stretches(steps, evaluations)]


@pytest.mark.parametrize(
    ("steps", "evaluations", "wanted"),
    [
        (100, 10, [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]),
        (100, 1, [90, 100]),
        (100, 4, [25, 50, 75, 90, 100]),
        (7, 10, [1, 2, 3, 4, 5, 6, 7]),  # 90 % of 7 is 6.3
        (2, 1, [1, 2]),
        (1, 10, [1]),
    ],
)
def test_a_stretch_ends_at_each_part_and_at_90_and_100_per_cent(steps, evaluations, wanted):
    assert ends(steps, evaluations) == wanted


def test_stretches_hold_every_step_once_and_none_is_empty():
    for steps in (1, 2, 3, 9, 11, 723):
        for evaluations in (1, 3, 10, 40):
            cut = schedules.stretches(steps, evaluations)
            assert [step for stretch in cut for step in stretch] == list(range(steps))
            assert all(map(len, cut)) and (
                steps == 1 or steps * 9 // 10 in ends(steps, evaluations)
            )
    assert schedules.stretches(0, 10) == [range(0)]  # the untrained student is measured once


def rates(name, steps, warmup_ratio):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8.0)
    schedule = schedules.learning_rate(optimizer, name, steps, warmup_ratio)
    taken = []
    for _ in range(steps):
        taken.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*taken, schedule.get_last_lr()[0]]


def test_the_rate_rises_and_falls_as_its_name_says():
    assert rates("constant", 3, 0.0) == [8.0] * 4  # exactly: as without a schedule
    assert rates("constant", 4, 0.5) == [0.0, 4.0, 8.0, 8.0, 8.0]
    assert rates("linear", 4, 0.0) == [8.0, 6.0, 4.0, 2.0, 0.0]
    assert rates("linear", 6, 1 / 3) == [0.0, 4.0, 8.0, 6.0, 4.0, 2.0, 0.0]
    cosine = rates("cosine", 6, 1 / 3)
    assert cosine == pytest.approx([0.0, 4.0, 8.0, 4 + 8**0.5, 4.0, 4 - 8**0.5, 0.0])


def trained(average, model, steps):
    """Weights that change at every step; those after each of them."""
    after = []
    for step in range(steps):
        with torch.no_grad():
            for number, parameter in enumerate(average.parameters):
                parameter.add_((step + 1) * (number + 1) / 8)
        average.update(step)
        after.append([parameter.detach().clone() for parameter in model.parameters()])
    return after


@pytest.mark.parametrize(("last", "first"), [(0.3, 7), (1.0, 0), (0.01, 9)])
def test_the_average_is_the_equal_mean_of_the_weights_after_the_last_steps(last, first):
    model = tiny_llama(tie_word_embeddings=True)
    average = schedules.Average(model.parameters(), 10, last)
    after = trained(average, model, 10)
    wanted = [torch.stack(values).mean(0) for values in zip(*after[first:])]
    held = [parameter.detach().clone() for parameter in model.parameters()]
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with average.in_place():
        torch.testing.assert_close([p.detach() for p in model.parameters()], wanted)
        assert model.lm_head.weight is model.model.embed_tokens.weight, "tied weights stay tied"
        logits = model(torch.tensor([[3, 4, 5]])).logits
    assert all(map(torch.equal, model.parameters(), held)), "training continues from these"
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert last < 0.1 or not torch.equal(model(torch.tensor([[3, 4, 5]])).logits, logits)


def test_the_weights_come_back_after_an_interrupt_inside_the_block():
    model = tiny_llama()
    average = schedules.Average(model.parameters(), 2, 1.0)
    trained(average, model, 2)
    held = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(KeyboardInterrupt), average.in_place():
        raise KeyboardInterrupt
    assert all(map(torch.equal, model.parameters(), held))


def test_before_its_steps_and_where_it_is_off_the_average_keeps_nothing():
    model = tiny_llama()
    for last, steps in ((0.0, 10), (0.3, 7)):
        average = schedules.Average(model.parameters(), 10, last)
        trained(average, model, steps)
        held = [parameter.data_ptr() for parameter in model.parameters()]
        with average.in_place():
            assert [parameter.data_ptr() for parameter in model.parameters()] == held
        assert average.values == []
