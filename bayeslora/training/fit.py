"""fit(): good manners around ``transformers.Trainer``, which owns the loop."""

import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PrinterCallback,
    ProgressCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback

from bayeslora.data.batches import Collator
from bayeslora.data.checks import check_to_learn_from
from bayeslora.data.sampling import sampling_strategy
from bayeslora.distributed import check_parallelism, launched_processes, on_main_process, rank, world_size
from bayeslora.errors import InputError
from bayeslora.inference.tuning import check_tunable
from bayeslora.inference.tuning import tune as tune_width
from bayeslora.posterior import Posterior
from bayeslora.storage.checkpoint import load_adapter, save_pretrained
from bayeslora.storage.lock import lock_folder
from bayeslora.storage.run_folder import (
    ADAPTER_FOLDER,
    CHECKPOINT_FOLDER,
    RUN_FILE,
    reporting_full_disk,
)
from bayeslora.training.arguments import check_evaluated, check_fit_arguments, check_names, check_resumable
from bayeslora.training.budget import FitOptions
from bayeslora.training.closing import close_run
from bayeslora.training.engines import Sharding, take_sharding
from bayeslora.training.held_out import hold_out
from bayeslora.training.metrics import Metrics
from bayeslora.training.monitor import BriefProgress, GroupedTensorBoard
from bayeslora.training.record import as_begun, begin_run, begun_sampling, refuse_other_content, run_record
from bayeslora.training.settings import fit_settings
from bayeslora.training.trainer import BayesTrainer, variational_rate


@dataclass(frozen=True)
class FitResult:
    """``metrics`` of the evaluation of what was kept, the log ``history``, the number of optimizer ``steps``, where the
    run lies, and the ``checkpoint`` that was kept: the step of the best evaluation, or the last."""

    metrics: dict[str, float]
    history: list[dict[str, float]]
    steps: int
    output_dir: Path
    checkpoint: int = 0

    def outcome(self) -> dict[str, Any]:
        """What ``run.json`` says of it."""
        return {name: getattr(self, name) for name in ("steps", "checkpoint", "metrics", "history")}


def fit(
    bayes: Posterior,
    train_dataset: Any,
    eval_dataset: Any = None,
    *,
    output_dir: str | Path,
    epochs: float | None = FitOptions.epochs,
    max_steps: int | None = FitOptions.max_steps,
    batch_size: int = FitOptions.batch_size,
    learning_rate: float = FitOptions.learning_rate,
    variational_learning_rate: float | None = FitOptions.variational_learning_rate,
    gradient_accumulation: int = FitOptions.gradient_accumulation,
    warmup: float = FitOptions.warmup,
    schedule: str = FitOptions.schedule,
    weight_decay: float = FitOptions.weight_decay,
    max_grad_norm: float = FitOptions.max_grad_norm,
    evaluations: int | None = FitOptions.evaluations,
    early_stopping: int | None = FitOptions.early_stopping,
    eval_samples: int = FitOptions.eval_samples,
    best_metric: str | None = FitOptions.best_metric,
    seed: int = FitOptions.seed,
    tune: Any = None,
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
        eval_dataset: The same, for evaluation; no evaluation when ``None``.
        output_dir: Run folder: ``run.json``, ``checkpoints/`` while training, ``adapter/`` at the end, and
            ``tensorboard/`` where that is installed; see :mod:`bayeslora.storage.run_folder`.
        epochs: Passes over the data; ``max_steps`` optimizer steps instead, where given. With neither, 3 or, for little
            data, as many as make 120 steps; texts are always read three times. A resumed run goes on with what it
            began with.
        batch_size: Examples per device and forward pass; ``gradient_accumulation`` of them make a step.
        learning_rate: For μ, B and the head. ``variational_learning_rate``: for the guide; 10 × as much if ``None``.
        warmup: Share of the steps over which the rates rise; then ``schedule`` (any transformers scheduler).
        weight_decay: Decoupled, on the network's matrices only; the posterior is regularised by its KL.
        max_grad_norm: Gradients are clipped to this norm; 0 switches clipping off.
        evaluations: How often to evaluate and save in the run; once an epoch if ``None``.
        early_stopping: Stop after so many evaluations without improvement of ``best_metric``.
        eval_samples: Draws that an evaluation scores beside the mean, the same at every evaluation and on up to 200
            examples: ``predictive_nll`` and, for classes, ``predictive_accuracy``, ``predictive_ece`` and so on. 0
            evaluates the mean alone.
        best_metric: Decides the best checkpoint: ``"predictive_nll"`` if ``None``, of the draws that are used
            afterwards, and ``"loss"`` (at the mean, nats) where no draws are scored; or another metric of the
            evaluation, such as ``"accuracy"``. Smaller loss or NLL or ECE or Brier is better, larger otherwise.
        seed: Decides data order, dropout and noise; the same seed gives the same run.
        tune: At the end, choose how wide the noise is, as :meth:`bayeslora.BayesLoRA.tune` does: by these labelled
            examples, which are none of the training's, or by a share of the training examples, such as 0.1, that is
            held out of training.
        resume: Continue an interrupted run from its last whole checkpoint, with the same arguments, as if it had
            never stopped; a finished run's result is loaded.
        progress: Show progress bars and print logs.
        compute_metrics: Further metrics of the evaluation, as for ``transformers.Trainer``: a function of its
            ``EvalPrediction``, whose predictions are the likelihood's outputs at the mean (logits).
        callbacks: Further ``TrainerCallback`` objects.
        metadata: JSON-able facts to keep in ``run.json``, such as the model's path and the task.
        trainer_arguments: Any further field of ``transformers.TrainingArguments`` (``bf16=True``, ...) but those that
            :mod:`bayeslora.training.arguments` lists. ``save_total_limit``: checkpoints to keep, 2 if not given; the
            best and the last always stay. ``greater_is_better``: of a ``best_metric`` that ``compute_metrics``
            gives. ``train_sampling_strategy``: for texts in one process ``"group_by_length"`` if not given, with which
            batches pad less.

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
    given = dict(locals())
    options = FitOptions(**{field.name: given[field.name] for field in dataclasses.fields(FitOptions)})
    output_dir = Path(output_dir)
    options.check(eval_dataset)
    options = as_begun(output_dir, resume, options)
    check_names(trainer_arguments)
    train_dataset, tuning_set = hold_out(train_dataset, tune, seed)
    data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "tune": tuning_set}
    collate = _check_data(bayes, data, batch_size)
    said = options.epochs is not None or options.max_steps is not None
    few_passes = bayes.model.labelling.learnt_in_few_passes
    options = options.settled(len(train_dataset), launched_processes(), few_passes)
    metrics = Metrics(bayes, compute_metrics, options.best_metric, options.eval_samples)
    if "train_sampling_strategy" not in trainer_arguments:
        begun = begun_sampling(output_dir, resume)
        trainer_arguments["train_sampling_strategy"] = begun or sampling_strategy(train_dataset, world_size())
    arguments, compiled = _arguments(bayes, options, data, metrics, output_dir, progress, trainer_arguments)
    rate = variational_rate(arguments, variational_learning_rate)
    record = run_record(bayes, arguments, rate, data, metadata, eval_samples=options.eval_samples)
    _compile(bayes, compiled)
    with ExitStack() as stack:
        checkpoint, finished = on_main_process(lambda: _open_folder(output_dir, resume, record, stack))
        if finished is not None:
            return _load_finished(bayes, finished, output_dir, arguments, len(train_dataset))
        with _refusing(output_dir, resume):
            trainer = BayesTrainer(
                bayes,
                arguments,
                collate,
                train_dataset,
                eval_dataset,
                variational_learning_rate=rate,
                compute_metrics=metrics if metrics.any else None,
                callbacks=[*callbacks, *([EarlyStoppingCallback(early_stopping)] if early_stopping else [])],
            )
            trainer.eval_samples = options.eval_samples
            trainer.get_train_dataloader()
        if progress and rank() == 0 and not said:
            _say_budget(options, len(train_dataset))
        result = _train(trainer, checkpoint, output_dir, progress, stack)
        _tune(trainer, tuning_set, output_dir, progress)
        on_main_process(lambda: close_run(bayes, record, output_dir, result.outcome()))
    bayes.eval()
    return result


def _say_budget(options: FitOptions, num_examples: int) -> None:
    steps = options.total_steps(num_examples, launched_processes())
    tqdm.write(
        f"{options.epochs:g} epochs = {steps} steps (the default for {num_examples} examples)",
        file=sys.stderr,
    )


def _check_data(bayes: Posterior, data: Mapping[str, Any], batch_size: int) -> Collator:
    """Refuse data that cannot be learnt from, evaluated or tuned on; what makes batches of it."""
    given = {name: part for name, part in data.items() if part is not None}
    collate = check_to_learn_from(bayes.model, given, batch_size)
    if "tune" in given:
        check_tunable(bayes, given["tune"])
    return collate


def _compile(bayes: Posterior, options: Mapping[str, Any] | None) -> None:
    if options is not None:
        bayes.compile(**options)


def _arguments(
    bayes: Posterior,
    options: FitOptions,
    data: Mapping[str, Any],
    metrics: Metrics,
    output_dir: Path,
    progress: bool,
    given: Mapping[str, Any],
) -> tuple[TrainingArguments, dict[str, Any] | None]:
    """What :func:`fit_settings` makes of it, checked."""
    evaluation = data["eval_dataset"]
    selection = {"eval_strategy": "no"} if evaluation is None else metrics.selection()
    arguments, compiled = fit_settings(options, len(data["train_dataset"]), output_dir, selection, progress, given)
    check_fit_arguments(arguments, bayes.network.get_base_model())
    check_resumable(arguments)
    check_evaluated(arguments, evaluation, metrics.best)
    Sharding.asked(arguments)
    check_parallelism(arguments)
    if world_size() > 1 and arguments.train_sampling_strategy == "group_by_length":
        raise InputError(
            "train_sampling_strategy='group_by_length' is for one process: several would be dealt another order once a "
            "run is resumed; leave it out"
        )
    return arguments, compiled


def _open_folder(
    output_dir: Path, resume: bool, record: dict[str, Any], stack: ExitStack
) -> tuple[Path | None, dict[str, Any] | None]:
    """Take the run's folder until ``stack`` closes; as :func:`bayeslora.training.record.begin_run`."""
    refuse_other_content(output_dir, resume)
    stack.enter_context(lock_folder(output_dir))
    stack.enter_context(reporting_full_disk(output_dir))
    return begin_run(output_dir, resume, record)


def _load_finished(
    bayes: Posterior, record: Mapping[str, Any], output_dir: Path, arguments: TrainingArguments, num_examples: int
) -> FitResult:
    bayes.num_examples = num_examples
    load_adapter(bayes, output_dir / ADAPTER_FOLDER)
    sharding = take_sharding(arguments)
    if sharding is not None:
        sharding.apply(bayes, arguments.device)
    bayes.to(arguments.device).eval()
    steps = record["steps"]
    return FitResult(record["metrics"], record["history"], steps, output_dir, record.get("checkpoint", steps))


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


def _train(
    trainer: BayesTrainer, checkpoint: Path | None, output_dir: Path, progress: bool, stack: ExitStack
) -> FitResult:
    set_seed(trainer.args.seed)
    _choose_reports(trainer, progress, stack)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    state, kept = trainer.state, trainer.state.global_step
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        kept = int(state.best_model_checkpoint.rpartition("-")[2])
    metrics = {} if trainer.eval_dataset is None else _evaluated_at(trainer, kept)
    return FitResult(metrics, state.log_history, state.global_step, output_dir, kept)


def _evaluated_at(trainer: BayesTrainer, step: int) -> dict[str, float]:
    """The evaluation of a step, from the log where it is there."""
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] == step]
    return {name: v for name, v in logged[-1].items() if name != "step"} if logged else trainer.evaluate()


def _tune(trainer: BayesTrainer, tuning_set: Any, output_dir: Path, progress: bool) -> None:
    """On every process, each with the same result; what was trained is safe before."""
    if tuning_set is None:
        return
    bayes = trainer.bayes
    on_main_process(lambda: save_pretrained(bayes, output_dir / ADAPTER_FOLDER))
    size = trainer.args.per_device_train_batch_size
    tune_width(bayes, tuning_set, batch_size=size, progress=progress and rank() == 0)


def _choose_reports(trainer: BayesTrainer, progress: bool, stack: ExitStack) -> None:
    trainer.remove_callback(PrinterCallback)
    if progress:
        trainer.pop_callback(ProgressCallback)
        trainer.add_callback(BriefProgress())
    if trainer.pop_callback(TensorBoardCallback) is not None:
        board = GroupedTensorBoard()
        trainer.add_callback(board)
        stack.callback(board.close)
