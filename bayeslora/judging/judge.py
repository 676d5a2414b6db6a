"""Let a model write answers to a task, and judge them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from bayeslora.analysis.metrics.detection import detection_scores
from bayeslora.analysis.texts.semantic import semantic_entropy
from bayeslora.analysis.texts.voting import vote
from bayeslora.errors import InputError
from bayeslora.judging.code_execution import humaneval_program, mean_pass_at_k, run_program
from bayeslora.tasks.text import TextTask, gsm8k_matches, gsm8k_number

if TYPE_CHECKING:
    from bayeslora.inference.generation import Generation
    from bayeslora.module import BayesLoRA


def judge(
    bayes: "BayesLoRA",
    task: TextTask,
    tokenizer: Any,
    split: str = "test",
    *,
    num_samples: int = 8,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    k: Sequence[int] = (1, 2, 4),
    execute_generated_code: bool = False,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> dict[str, float]:
    """Write answers with each of S draws, and judge them.

    gsm8k: ``strict`` and ``flexible``, the share of right answers, averaged over the draws; ``..._vote`` and
    ``..._weighted_vote``, with one answer a question by majority, and by votes weighted by each text's mean
    log-probability; ``..._auroc``, the chance that answers to a question whose majority is wrong have a larger
    :func:`~bayeslora.analysis.semantic_entropy` than those to one whose majority is right, left out where all are or
    none. humaneval: ``pass@k`` for every k up to S.

    Args:
        bayes: The fitted module.
        task: gsm8k or humaneval.
        tokenizer: Its tokenizer.
        split: Of the task.
        num_samples: S, draws; 0 writes one answer with the posterior mean.
        max_new_tokens, temperature, top_p, seed, batch_size, progress: As in
            :func:`bayeslora.inference.generation.generate`.
        k: Of pass@k; those above S are left out.
        execute_generated_code: Must be True for humaneval; see :mod:`bayeslora.judging.code_execution`.
        limit: A random subset of this size.

    Raises:
        InputError: for another task, and for humaneval without the switch: before anything is written.
    """
    if task.name == "humaneval":
        run_program("", execute_generated_code=execute_generated_code)  # fails here rather than after an hour's writing
    elif task.name != "gsm8k":
        raise InputError(f"nothing judges what a model writes for {task.name!r}; there are gsm8k and humaneval")
    written = bayes.generate(
        task.prompts(tokenizer, split, limit=limit, seed=seed),
        tokenizer=tokenizer,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stops=task.stops,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    data = task.split(split, limit=limit, seed=seed)
    if task.name == "gsm8k":
        return judge_gsm8k(written, data["answer"][:])
    assert written.texts is not None
    passed = []
    for row, texts in zip(
        tqdm(data, "run", disable=None if progress else True, leave=False), written.texts, strict=True
    ):
        programs = [humaneval_program(row["prompt"], text, row["test"], row["entry_point"]) for text in texts]
        passed.append([run_program(p, execute_generated_code=execute_generated_code).passed for p in programs])
    return {f"pass@{size}": mean_pass_at_k(passed, size) for size in k if size <= len(passed[0])}


def judge_gsm8k(written: "Generation", solutions: Sequence[str]) -> dict[str, float]:
    """See :func:`judge`; ``solutions`` are the data's, ending in ``#### NUMBER``."""
    assert written.texts is not None
    scores = {}
    right = [gsm8k_number(solution) for solution in solutions]
    by_draw = [gsm8k_matches(texts, solutions) for texts in zip(*written.texts, strict=True)]
    weights = np.log(np.maximum(written.confidence, 1e-300))
    for rule in ("strict", "flexible"):
        numbers = [[gsm8k_number(text, flexible=rule == "flexible") for text in texts] for texts in written.texts]
        scores[rule] = float(np.mean([matches[rule] for matches in by_draw]))
        if len(by_draw) > 1:
            for name, log_weights in ((f"{rule}_vote", None), (f"{rule}_weighted_vote", weights)):
                answers = vote(numbers, log_weights).answers
                correct = np.array([a == r for a, r in zip(answers, right, strict=True)])
                scores[name] = float(correct.mean())
                if log_weights is None and 0 < correct.sum() < len(correct):
                    unsure = semantic_entropy([[of_prompt.index(one) for one in of_prompt] for of_prompt in numbers])
                    scores[f"{rule}_auroc"] = detection_scores(unsure[correct], unsure[~correct]).auroc
    return scores
