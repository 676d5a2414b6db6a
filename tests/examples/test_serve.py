"""The example service, asked over HTTP on the loopback address by many clients at once."""

import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from tests.bulk.fitted_runs import sentences, text_run
from tests.scripts import script

pytestmark = pytest.mark.slow
uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is not installed")
pytest.importorskip("fastapi", reason="the extra serve is not installed")


@contextmanager
def served(run, **options):
    """The address of the service of a run."""
    app = script("examples/serve").create_app(run, num_samples=2, **options)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def ask(address, question):
    """Status and answer."""
    request = urllib.request.Request(
        f"{address}/predict", json.dumps(question).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_nothing_is_lost_under_load():
    """200 requests by 16 clients: each has the answer to its own text, whatever was asked beside it."""
    run, texts = text_run(), sentences(200)
    expected = run.predict(texts, num_samples=2, progress=False)
    with served(run) as address, ThreadPoolExecutor(16) as clients:
        answers = [*clients.map(lambda text: ask(address, {"text": text}), texts)]
    assert {status for status, _ in answers} == {200}
    said = np.array([[*answer["probs"].values()] for _, answer in answers])
    np.testing.assert_allclose(said, expected.probs, atol=2e-6)


class Held:
    """A run whose predictions wait."""

    text_columns, label_names = ("text",), ("bad", "good")

    def __init__(self, run):
        self.run, self.go, self.sizes = run, threading.Event(), []

    def predict(self, texts, pairs, **options):
        self.go.wait(60)
        self.sizes.append(len(texts))
        return self.run.predict(texts, pairs, **options)


def test_overload_is_answered_at_once():
    held = Held(text_run())
    with served(held, batch_size=4, queue=8) as address, ThreadPoolExecutor(40) as clients:
        asked = [clients.submit(ask, address, {"text": text}) for text in sentences(40)]
        deadline = time.monotonic() + 60
        while sum(one.done() for one in asked) < 40 - 8 - 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        refused = [one.result()[0] for one in asked if one.done()]
        assert refused
        assert set(refused) == {503}
        held.go.set()
        statuses = [one.result()[0] for one in asked]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) == sum(held.sizes) == 40 - len(refused)
    assert max(held.sizes) == 4  # those that waited were predicted together


@pytest.mark.parametrize(
    "question", [{}, {"text": ""}, {"text": "  "}, {"text": 3}, {"text": None}, {"texts": ["a"]}, {"text": "a", "x": 1}]
)
def test_what_is_no_text(question):
    with served(text_run()) as address:
        assert ask(address, question)[0] == 422
        assert ask(address, {"text": "a film"})[0] == 200


def test_pairs_where_they_belong():
    with served(text_run(("one", "two"))) as address:
        assert ask(address, {"text": "a film"})[0] == 422
        assert ask(address, {"text": "a film", "pair": "the plot"})[0] == 200
    with served(text_run()) as address:
        assert ask(address, {"text": "a film", "pair": "the plot"})[0] == 422
