"""When a run's state is kept, and what several processes are told of each other."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from fastmsflow.distributed.process_group import ProcessGroup
from fastmsflow.training import Recipe
from fastmsflow.training.checkpointing import AGREE_EVERY, ResumeCheckpoint


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 2, 3, 4, 5, 10])
def test_within_an_epoch_processes_agree_every_so_many_steps_and_before_an_evaluation(
    accumulate: int, processes: int, monkeypatch
) -> None:
    asked: list[int] = []
    state = ResumeCheckpoint(Path(), Recipe(sub_epochs=1, accumulate=accumulate), ProcessGroup(0, processes), None)
    monkeypatch.setattr(ResumeCheckpoint, "_save", lambda self, trainer, due: asked.append(trainer.batch))
    batches = 35 * accumulate + 1
    for batch in range(batches):
        trainer = SimpleNamespace(
            num_training_batches=batches, accumulate_grad_batches=accumulate, current_epoch=0, batch=batch
        )
        state.on_train_batch_end(trainer, None, None, None, batch)
    steps = range(1, 36) if processes == 1 else [*range(AGREE_EVERY, 35, AGREE_EVERY), 35]
    assert asked == [step * accumulate - 1 for step in steps]


@pytest.mark.parametrize("error", [MemoryError(), AssertionError()], ids=repr)
def test_an_error_without_a_text_is_not_lost(error: Exception) -> None:
    with pytest.raises(type(error)), ProcessGroup().raise_on_any_rank():
        raise error
