"""fit(): good manners around ``transformers.Trainer``, which owns the loop."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback

from bayeslora.data.checks import check_to_learn_from
from bayeslora.distributed import check_parallelism, on_main_process
from bayeslora.errors import InputError
from bayeslora.module import BayesLoRA
from bayeslora.storage.checkpoint import load_adapter
from bayeslora.storage.run_folder import (
    ADAPTER_FOLDER,
    CHECKPOINT_FOLDER,
    RUN_FILE,
    lock_folder,
    reporting_full_disk,
    write_json,
)
from bayeslora.training.arguments import check_fit_arguments, check_words
from bayeslora.training.budget import trainer_settings
from bayeslora.training.metrics import Metrics
from bayeslora.training.monitor import BriefProgress, GroupedTensorBoard
from bayeslora.training.record import begin_run, refuse_other_content, run_record
from bayeslora.training.trainer import BayesTrainer, variational_rate


@dataclass(frozen=True)
class FitResult:
    """``metrics`` of the last evaluation (of the best checkpoint where one was kept), the log ``history``, the
    number of optimizer ``steps``, and where the run lies."""

    metrics: dict[str, float]
    history: list[dict[str, float]]
    steps: int
    output_dir: Path


def fit(
    bayes: BayesLoRA,
    train_dataset: Any,
    eval_dataset: Any = None,
    *,
    output_dir: str | Path,
    epochs: float = 3,
    max_steps: int | None = None,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    variational_learning_rate: float | None = None,
    gradient_accumulation: int = 1,
    warmup: float = 0.06,
    schedule: str = "linear",
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    evaluations: int | None = None,
    early_stopping: int | None = None,
    best_metric: str = "loss",
    seed: int = 0,
    resume: bool = False,
    progress: bool = True,
    compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
    callbacks: Sequence[Any] = (),
    metadata: Mapping[str, Any] | None = None,
    **trainer_arguments: Any,
) -> FitResult:
    """Fit the posterior by stochastic variational inference.

    Args:
        bayes: What to fit; left at the best checkpoint where ``eval_dataset`` is given, else at the last step.
        train_dataset: Encoded examples with ``labels`` (or ``label``), of the kinds that
            :func:`bayeslora.inference.predict.predict` takes.
        eval_dataset: The same, for evaluation at the posterior mean; no evaluation when ``None``.
        output_dir: Run folder: ``run.json``, ``checkpoints/`` while training, ``adapter/`` at the end, and
            ``tensorboard/`` where that is installed; see :mod:`bayeslora.storage.run_folder`.
        epochs: Passes over the data; ``max_steps`` optimizer steps instead, where given.
        batch_size: Examples per device and forward pass; ``gradient_accumulation`` of them make a step.
        learning_rate: For μ, B and the head. ``variational_learning_rate``: for the guide; 10 × as much if ``None``.
        warmup: Share of the steps over which the rates rise; then ``schedule`` (any transformers scheduler).
        weight_decay: Decoupled, on the network's matrices only; the posterior is regularised by its KL.
        max_grad_norm: Gradients are clipped to this norm; 0 switches clipping off.
        evaluations: How often to evaluate and save in the run; once an epoch if ``None``.
        early_stopping: Stop after so many evaluations without improvement of ``best_metric``.
        best_metric: ``"loss"`` (at the mean, nats) or an evaluation metric such as ``"accuracy"``; decides the best
            checkpoint, smaller loss or NLL or ECE or Brier better, larger otherwise.
        seed: Decides data order, dropout and noise; the same seed gives the same run.
        resume: Continue an interrupted run from its last whole checkpoint, with the same arguments, as if it had
            never stopped; a finished run's result is loaded.
        progress: Show progress bars and print logs.
        compute_metrics: Further metrics of the evaluation, as for ``transformers.Trainer``: a function of its
            ``EvalPrediction``, whose predictions are the likelihood's outputs at the mean (logits).
        callbacks: Further ``TrainerCallback`` objects.
        metadata: JSON-able facts to keep in ``run.json``, such as the model's path and the task.
        trainer_arguments: Any further field of ``transformers.TrainingArguments`` (``bf16=True``, ...) but those that
            :mod:`bayeslora.training.arguments` lists. ``save_total_limit``: checkpoints to keep, 2 if not given; the
            best and the last always stay. ``greater_is_better``: of a ``best_metric`` that ``compute_metrics`` gives.

    Raises:
        InputError: for bad data (:mod:`bayeslora.data.checks`) or arguments, or an output folder that holds something
            else or is in use.
        TrainingDivergedError: when the loss or a gradient is NaN or infinite; the last good checkpoint stays.
        StorageError: when the disk is full; the last good checkpoint stays.

    Example:
        >>> result = fit(BayesLoRA(network), dataset, output_dir="run", epochs=2, batch_size=4, progress=False)
        >>> result.steps, sorted(path.name for path in result.output_dir.iterdir() if path.is_file())
        (4, ['run.json'])
    """
    output_dir = Path(output_dir)
    if eval_dataset is None and (early_stopping is not None or evaluations is not None):
        raise InputError("early_stopping and evaluations need an eval_dataset to look at")
    check_counts(batch_size=batch_size, gradient_accumulation=gradient_accumulation, max_steps=max_steps,
                  evaluations=evaluations, early_stopping=early_stopping)  # fmt: skip
    check_words(trainer_arguments)
    data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    collate = check_to_learn_from(bayes, {n: part for n, part in data.items() if part is not None}, batch_size)
    metrics_of = Metrics(bayes, compute_metrics, best_metric)
    settings = {
        **trainer_settings(
            len(train_dataset), output_dir, epochs=epochs, max_steps=max_steps, batch_size=batch_size,
            learning_rate=learning_rate, gradient_accumulation=gradient_accumulation, warmup=warmup,
            schedule=schedule, weight_decay=weight_decay, max_grad_norm=max_grad_norm, evaluations=evaluations,
            seed=seed, progress=progress,
        ),
        **(metrics_of.selection() if eval_dataset is not None else {"eval_strategy": "no"}),
        "report_to": installed_loggers(),
        "restore_callback_states_from_checkpoint": True,  # early stopping goes on counting after a resume
        "ddp_find_unused_parameters": False,  # every trained parameter gets a gradient in every step
        "save_total_limit": 2,
        **trainer_arguments,
    }  # fmt: skip
    compiled = compile_options(settings)
    try:
        arguments = TrainingArguments(**settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"transformers.TrainingArguments refuses an argument: {error}") from error
    check_fit_arguments(arguments, bayes.network.get_base_model())
    check_resumable(arguments)
    check_evaluated(arguments, eval_dataset, best_metric)
    check_parallelism(arguments)
    rate = variational_rate(arguments, variational_learning_rate)
    record = run_record(bayes, arguments, rate, len(train_dataset), metadata)
    if compiled is not None:
        bayes.compile(**compiled)
    with ExitStack() as stack:

        def open_run() -> tuple[Path | None, dict[str, Any] | None]:
            refuse_other_content(output_dir, resume)
            stack.enter_context(lock_folder(output_dir))
            stack.enter_context(reporting_full_disk(output_dir))
            return begin_run(output_dir, resume, record)

        checkpoint, finished = on_main_process(open_run)
        if finished is not None:
            load_adapter(bayes, output_dir / ADAPTER_FOLDER)
            bayes.num_examples = len(train_dataset)
            bayes.to(arguments.device).eval()
            return FitResult(finished["metrics"], finished["history"], finished["steps"], output_dir)
        with _refusing(output_dir, resume):
            trainer = BayesTrainer(
                bayes,
                arguments,
                collate,
                train_dataset,
                eval_dataset,
                variational_learning_rate=rate,
                compute_metrics=metrics_of if metrics_of.any else None,
                callbacks=[*callbacks, *([EarlyStoppingCallback(early_stopping)] if early_stopping else [])],
            )
            trainer.get_train_dataloader()
        set_seed(seed)
        _choose_reports(trainer, progress, stack)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        metrics = trainer.evaluate() if eval_dataset is not None else {}
        history, steps = trainer.state.log_history, trainer.state.global_step

        def close_run() -> None:
            bayes.save_pretrained(output_dir / ADAPTER_FOLDER)
            record.update(finished=True, steps=steps, metrics=metrics, history=history)
            write_json(output_dir / RUN_FILE, record)

        on_main_process(close_run)
    bayes.eval()
    return FitResult(metrics, history, steps, output_dir)


@contextmanager
def _refusing(output_dir: Path, resume: bool) -> Iterator[None]:
    """What Trainer refuses when it is built is an argument's fault, and must not leave a run that blocks the folder."""
    try:
        yield
    except InputError:
        raise
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        if not resume:
            (output_dir / RUN_FILE).unlink(missing_ok=True)
            shutil.rmtree(output_dir / CHECKPOINT_FOLDER, ignore_errors=True)
        raise InputError(f"transformers.Trainer refuses an argument: {error}") from error


def _choose_reports(trainer: Trainer, progress: bool, stack: ExitStack) -> None:
    trainer.remove_callback(PrinterCallback)
    if progress:
        trainer.pop_callback(ProgressCallback)
        trainer.add_callback(BriefProgress())
    if trainer.pop_callback(TensorBoardCallback) is not None:
        board = GroupedTensorBoard()
        trainer.add_callback(board)
        stack.callback(board.close)


def compile_options(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Takes Trainer's words for torch.compile out of ``settings``: it would compile Pyro too, and not the network."""
    wanted = settings.pop("torch_compile", False)
    options = {word: settings.pop(f"torch_compile_{word}", None) for word in ("backend", "mode")}
    options = {word: value for word, value in options.items() if value is not None}
    return options if wanted or options else None


def installed_loggers() -> list[str]:
    from importlib.util import find_spec

    return ["tensorboard"] if find_spec("tensorboard") else []


def check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")


def check_resumable(arguments: TrainingArguments) -> None:
    """Refuse what would let a run start that cannot be resumed exactly."""
    promised = {"save_only_model": False, "ignore_data_skip": False, "restore_callback_states_from_checkpoint": True}
    for name, value in promised.items():
        if getattr(arguments, name) != value:
            raise InputError(
                f"{name}={not value} leaves checkpoints from which a run cannot be resumed exactly: leave it out "
                "(save_strategy='no' writes no checkpoints at all)"
            )


def check_evaluated(arguments: TrainingArguments, eval_dataset: Any, best_metric: str) -> None:
    """What looks at an evaluation has one to look at."""
    if eval_dataset is None and (arguments.eval_strategy != "no" or arguments.load_best_model_at_end):
        raise InputError("eval_strategy and load_best_model_at_end need an eval_dataset to look at")
    if eval_dataset is not None and arguments.dataloader_drop_last:
        smallest = arguments.per_device_eval_batch_size * arguments.world_size
        if len(eval_dataset) < smallest:
            raise InputError(f"dataloader_drop_last=True drops all {len(eval_dataset)} examples of the eval_dataset: "
                             "pass a smaller per_device_eval_batch_size")  # fmt: skip
    if arguments.prediction_loss_only and best_metric != "loss":
        raise InputError(f"prediction_loss_only=True computes the loss alone, and best_metric is {best_metric!r}")
