"""Draws on a server, averaged: against a stub that answers as OpenAI's interface does, on the loopback address."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from scipy.special import entr

from bayeslora import InputError
from bayeslora.serving import average

DRAWS = {  # log-probabilities of the next token, by model
    "draw-000": {" A": 0.6, " B": 0.3, " C": 0.05},
    "draw-001": {" A": 0.1, " B": 0.8, " D": 0.1},
}
MESSAGES = [{"role": "user", "content": "A or B?"}]


class Stub(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.path, dict(self.headers), asked))
        draw = DRAWS.get(asked["model"])
        if draw is None:
            return self.reply(404, {"error": f"no model {asked['model']}"})
        if asked["model"] in self.server.broken:
            return self.reply(200, {"choices": [{"text": " A"}]})
        most = asked["top_logprobs"] if "messages" in asked else asked["logprobs"]
        told = {token: float(np.log(p)) for token, p in sorted(draw.items(), key=lambda item: -item[1])[: int(most)]}
        content = [{"top_logprobs": [{"token": token, "logprob": value} for token, value in told.items()]}]
        logprobs = {"content": content} if "messages" in asked else {"top_logprobs": [told]}
        self.reply(200, {"choices": [{"logprobs": logprobs}]})

    def reply(self, code, content):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.asked, server.broken = [], set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("prompt", ["A or B?", MESSAGES], ids=["text", "messages"])
def test_probabilities_are_averaged(server, prompt):
    said = average(server.url, [*DRAWS], prompt, choices=[" A", " B"])
    each = np.array([[2 / 3, 1 / 3], [1 / 9, 8 / 9]])
    np.testing.assert_allclose(said.sample_probs, each)
    np.testing.assert_allclose(said.probs, each.mean(0))
    np.testing.assert_allclose(said.entropy, entr(each.mean(0)).sum())
    np.testing.assert_allclose(said.mutual_information, said.entropy - entr(each).sum(1).mean())
    np.testing.assert_allclose(said.unlisted, [0.05, 0.0], atol=1e-12)
    path, _, asked = server.asked[0]
    assert path == ("/v1/completions" if isinstance(prompt, str) else "/v1/chat/completions")
    assert asked["max_tokens"] == 1


def test_all_tokens_that_are_listed(server):
    said = average(server.url, [*DRAWS], "A or B?")
    assert dict(zip(said.choices, said.probs.round(4), strict=True)) == {
        " A": 0.35,
        " B": 0.55,
        " C": 0.025,
        " D": 0.05,
    }


def test_a_temperature_divides_logits(server):
    said = average(server.url, ["draw-000"], "A or B?", choices=[" A", " B"], temperature=2.0)
    odds = np.sqrt([0.6, 0.3])
    np.testing.assert_allclose(said.probs, odds / odds.sum())


def test_a_choice_that_is_not_listed_is_bounded(server):
    said = average(server.url, ["draw-000"], "A or B?", choices=[" A", " C"], top_logprobs=2)
    assert said.probs.tolist() == [1.0, 0.0]
    np.testing.assert_allclose(said.unlisted, [0.1])


def test_the_key_is_sent(server):
    average(server.url, ["draw-000"], "A", api_key="secret")
    assert server.asked[0][1]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"models": ["draw-009"]}, r"answers 404 for model 'draw-009'"),
        ({"models": []}, "at least one"),
        ({"models": "draw-000"}, "a list"),
        ({"choices": [" Z"]}, "lists none of the choices"),
        ({"temperature": 2.0}, "needs choices"),
        ({"top_logprobs": 30}, "in 1 to 20"),
        ({"url": "http://127.0.0.1:9/v1"}, "cannot be asked"),
    ],
)
def test_what_is_refused(server, options, says):
    with pytest.raises(InputError, match=says):
        average(**{"url": server.url, "models": [*DRAWS], "prompt": "A or B?", **options})


def test_an_answer_without_probabilities(server):
    server.broken.add("draw-001")
    with pytest.raises(InputError, match=r"'draw-001' has no probabilities"):
        average(server.url, [*DRAWS], "A or B?")
