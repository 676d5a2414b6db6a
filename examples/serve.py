"""A fitted run as a service: requests that come together are predicted together.

    pip install 'bayeslora[serve]'
    python examples/serve.py runs/reviews --port 8000
    curl localhost:8000/predict -H 'content-type: application/json' -d '{"text": "the film is good"}'

A request waits until the network is free, at most ``--batch-size`` of them are one batch, and all have the same draws:
the answer to a text does not depend on what else is asked. Where more wait than ``--queue``, a request is
answered 503 at once; what is no text, or no pair where the run reads pairs, is answered 422.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any, NamedTuple

import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, StringConstraints

from bayeslora import InputError, open_run

Text = Annotated[str, StringConstraints(strict=True, strip_whitespace=True, min_length=1, max_length=100_000)]


class Question(BaseModel, extra="forbid"):
    text: Text
    pair: Text | None = None


class Waiting(NamedTuple):
    question: Question
    answer: asyncio.Future


def create_app(run: Any, *, num_samples: int = 16, batch_size: int = 32, queue: int = 256) -> FastAPI:
    """The service of a run that :func:`bayeslora.open_run` opened.

    Args:
        run: The run; any number of services may share it.
        num_samples: Draws of each prediction.
        batch_size: Requests that are predicted together, at most.
        queue: Requests that may wait.
    """
    waiting: asyncio.Queue[Waiting] = asyncio.Queue(queue)

    def predict(questions: list[Question]) -> list[dict[str, Any]]:
        pairs = [question.pair for question in questions] if questions[0].pair is not None else None
        said = run.predict([question.text for question in questions], pairs, num_samples=num_samples, progress=False)
        return [said.row(index) for index in range(len(said))]

    async def work() -> None:
        while True:
            batch = [await waiting.get()]
            while len(batch) < batch_size and not waiting.empty():
                batch.append(waiting.get_nowait())
            try:
                answers = await asyncio.to_thread(predict, [one.question for one in batch])
            except Exception as error:  # told to each that asked, and the service goes on
                for one in batch:
                    if not one.answer.done():
                        one.answer.set_exception(error)
                continue
            for one, answer in zip(batch, answers, strict=True):
                if not one.answer.done():  # whoever asked may have left
                    one.answer.set_result(answer)

    @asynccontextmanager
    async def working(app: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(work())
        yield
        worker.cancel()
        with suppress(asyncio.CancelledError):
            await worker

    app = FastAPI(title="bayeslora", lifespan=working)
    reads_pairs = len(run.text_columns) == 2

    @app.post("/predict")
    async def answer(question: Question) -> dict[str, Any]:
        if (question.pair is not None) != reads_pairs:
            raise HTTPException(422, "this run reads pairs: give one" if reads_pairs else "this run reads single texts")
        future = asyncio.get_running_loop().create_future()
        try:
            waiting.put_nowait(Waiting(question, future))
        except asyncio.QueueFull:
            raise HTTPException(503, "too many requests wait already", headers={"Retry-After": "1"}) from None
        try:
            return await future
        except InputError as error:
            raise HTTPException(422, str(error)) from error

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"waiting": waiting.qsize(), "labels": run.label_names}

    return app


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Serve a fitted run.")
    parser.add_argument("run_dir")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--queue", type=int, default=256)
    given = parser.parse_args(words)
    options = {"num_samples": given.num_samples, "batch_size": given.batch_size, "queue": given.queue}
    uvicorn.run(create_app(open_run(given.run_dir), **options), host=given.host, port=given.port)


if __name__ == "__main__":
    main()
