"""A training in a notebook front end, where transformers draws the progress as a table."""
from tiny_run import trainer
from transformers.trainer_callback import ProgressCallback
from transformers.utils.notebook import NotebookProgressCallback


def test_a_training_draws_its_table(tmp_path, monkeypatch):
    "With validations, which have no loss, and a best model that is chosen by one of their metrics."
    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", NotebookProgressCallback)
    run = trainer(tmp_path, max_steps=2, disable_tqdm=False, eval_strategy="steps", eval_steps=1, save_strategy="steps",
                  save_steps=1, load_best_model_at_end=True, metric_for_best_model="dense_R@1", patience=2)
    kinds = [type(c) for c in run.callback_handler.callbacks]
    assert NotebookProgressCallback in kinds and ProgressCallback not in kinds
    [table] = [c for c in run.callback_handler.callbacks if isinstance(c, NotebookProgressCallback)]
    drawn, end = [], table.on_train_end

    def kept(*args, **named):
        drawn.append(table.training_tracker.inner_table)
        end(*args, **named)
    table.on_train_end = kept
    run.train()
    [rows] = drawn
    assert len(rows) == 3 and run.state.best_metric is not None      # a line of names, and one for each validation
    assert any("dense" in name.lower() for name in rows[0]), rows[0]
