"""Adapter folders from others: a working adapter or exactly one InputError, whatever is in the files.

Whoever edits a file can compute its hashes again, so every case here is sealed after the damage.
"""

import contextlib
import copy
import json
import os
import pickle
import shutil
import struct
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig
from bayeslora.command.main import main
from bayeslora.files.records import MAX_JSON_BYTES, read_json, read_run
from bayeslora.storage.manifest import ADAPTER_CONFIG, ADAPTER_WEIGHTS, FILES, MANIFEST, POSTERIOR
from bayeslora.storage.peft_files import open_peft_adapter
from tests import conftest
from tests.folders import reseal
from tests.modules import fitted, logits

QUERY = "bert.encoder.layer.0.attention.self.query"
QUERY_A = f"base_model.model.{QUERY}.lora_A.weight"
SEVERAL = settings(
    max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def tiny_network():
    return conftest.tiny_network(layers=1)


pytestmark = pytest.mark.timeout(120)  # a pattern or a pipe that takes for ever fails here


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    fitted(guide="mean_field", network_options={"layers": 1}).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


@contextlib.contextmanager
def another(saved):
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(shutil.copytree(saved, Path(scratch) / "adapter"))


def complaint(action, *arguments):
    """The one InputError of an action, or None where it works."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's own advice
            result = action(*arguments)
    except InputError as error:
        return brief(str(error))
    if isinstance(result, BayesLoRA):
        assert torch.isfinite(logits(result)).all()
        assert all(torch.isfinite(value).all() for value in result.sample(1, seed=0).values())
    return None


def brief(message):
    assert 10 < len(message) < 1500
    return message


def opens(folder):
    return complaint(BayesLoRA.from_pretrained, folder, tiny_network())


def edit_json(folder, name=ADAPTER_CONFIG, /, **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    reseal(folder)


def edit_config(folder, **changes):
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    reseal(folder, config=manifest["config"] | changes)


def edit_tensors(folder, name, change):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    reseal(folder)


# ---- any damage at all ----

numbers = st.sampled_from(
    [0, 1, -1, 2, 2**40, 2**63, 10**12, 10**400, 0.0, -0.5, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")]
)
texts = st.sampled_from(
    [
        "",
        "LORA",
        "SEQ_CLS",
        "../../x",
        "/etc/passwd",
        "~nobody-at-all/x",
        "(a+)+$",
        ".*",
        "[",
        "\0",
        "\ud800",
        "all-linear",
        "query",
        "lora_A",
        "default",
        "none",
        "A" * 10_000,
    ]
)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw, document):
    """A JSON document with one to three entries, at any depth, replaced, removed, renamed or added."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        place = document
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            how = draw(st.sampled_from(["replace", "replace", "remove", "rename", "add"]))
            if how == "replace":
                place[key] = draw(values)
            elif how == "remove" or isinstance(place, list):
                del place[key]
            else:
                place[draw(texts)] = place.pop(key) if how == "rename" else draw(values)
            break
    return document


class TestAnyDamage:
    @pytest.mark.parametrize("name", [MANIFEST, ADAPTER_CONFIG])
    def test_json(self, name, saved):
        document, refused = json.loads((saved / name).read_text(encoding="utf-8")), []

        @SEVERAL
        @given(damaged(document))
        def check(changed):
            with another(saved) as folder:
                (folder / name).write_text(json.dumps(changed), encoding="utf-8")
                reseal_what_can_be(folder)
                refused.append(opens(folder) is not None)

        check()
        assert any(refused)
        assert not all(refused)

    def test_configuration(self, saved):
        """The part of the manifest that becomes a MonteCLoRAConfig, and that class on its own."""
        manifest, refused = json.loads((saved / MANIFEST).read_text(encoding="utf-8")), []

        @SEVERAL
        @given(damaged(manifest["config"]))
        def check(changed):
            alone = complaint(MonteCLoRAConfig.from_dict, changed)
            with another(saved) as folder:
                reseal(folder, config=changed)
                refused.append(opens(folder) is not None)
            assert refused[-1] or alone is None

        check()
        assert any(refused)
        assert not all(refused)

    @pytest.mark.parametrize("name", FILES)
    def test_bytes(self, name, saved):
        """Cut at any byte, bits flipped, stretches lost, doubled or overwritten."""
        content, refused = (saved / name).read_bytes(), []
        start = struct.unpack("<Q", content[:8])[0] if name != ADAPTER_CONFIG else len(content)

        @SEVERAL
        @given(
            st.integers(0, len(content) - 1) | st.integers(0, min(start, len(content) - 1)),
            st.sampled_from(["cut", "flip", "lose", "double", "overwrite"]),
            st.binary(min_size=1, max_size=9),
        )
        def check(place, how, noise):
            changed = {
                "cut": content[:place],
                "flip": content[:place] + bytes([content[place] ^ 1 << noise[0] % 8]) + content[place + 1 :],
                "lose": content[:place] + content[place + len(noise) :],
                "double": content[:place] + content[place : place + len(noise)] + content[place:],
                "overwrite": content[:place] + noise + content[place + len(noise) :],
            }[how]
            with another(saved) as folder:
                (folder / name).write_bytes(changed)
                reseal(folder)
                refused.append(opens(folder) is not None)

        check()
        assert any(refused)

    def test_every_truncation_of_the_header(self, saved):
        content = (saved / POSTERIOR).read_bytes()
        with another(saved) as folder:
            for length in [*range(0, 24), *range(24, len(content), 97)]:
                (folder / POSTERIOR).write_bytes(content[:length])
                reseal(folder)
                assert f"{POSTERIOR} is not a readable safetensors file" in opens(folder)

    def test_run_record(self, tmp_path):
        record = {
            "model": "demo",
            "max_length": 64,
            "finished": True,
            "metrics": {"eval_loss": float("nan")},
            "task": {
                "name": "reviews",
                "data_dir": "/data",
                "text_columns": ["text"],
                "label_column": "stars",
                "label_names": ["bad", "good"],
            },
        }
        path = tmp_path / "run.json"
        path.write_text(json.dumps(record))
        assert complaint(read_run, path) is None
        refused = []

        @SEVERAL
        @given(damaged(record))
        def check(changed):
            path.write_text(json.dumps(changed))
            refused.append(complaint(read_run, path) is not None)
            if not refused[-1]:
                assert isinstance(changed["model"], str)
                assert set(changed["task"]) <= set(record["task"])

        check()
        assert any(refused)
        assert not all(refused)


RUN = {"model": "../../somewhere", "max_length": 64, "task": {"name": "reviews"}}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "run.json is damaged"),
        (json.dumps(RUN | {"model": ["demo"]}), "'model' is missing or damaged"),
        (json.dumps(RUN | {"model": "~nobody-at-all/x"}), "'model' is missing or damaged"),
        (json.dumps(RUN | {"task": {"name": "reviews", "trust_remote_code": True}}), "'task' is missing or damaged"),
        (json.dumps(RUN | {"task": {"data_dir": "/data"}}), "'task' is missing or damaged"),
        (json.dumps(RUN | {"max_length": 2**60}), "'max_length' is missing or damaged"),
        (json.dumps(RUN), "unknown task 'reviews'"),
    ],
)
def test_evaluate_an_untrusted_run(text, reason, tmp_path, capsys):
    """One line on standard error and exit code 2."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "run.json").write_text(text)
    assert main(["evaluate", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bayeslora: ")
    assert reason in line


def reseal_what_can_be(folder):
    """A manifest without some entry cannot even be sealed."""
    with contextlib.suppress(AttributeError, TypeError, ValueError, KeyError):
        reseal(folder)


# ---- JSON ----


class TestJSON:
    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("[" * 100_000, "recursion|deep"),
            ('{"a":' * 100_000, "recursion|deep"),
            ('{"a":' * 50 + "1" + "}" * 50, "nested more than"),
            ('{"r": 1, "r": 2}', "given twice"),
            ('{"a": {"b": 1, "b": 1}}', "given twice"),
            ('{"r": ' + "9" * 5000 + "}", "integer string conversion"),
            ("[1]", "a list, not an object"),
            ('"\\ud800"', "a str, not an object"),
            ("\ufeff{}", "BOM"),
            ("", "Expecting value"),
        ],
    )
    def test_refused_as_damaged(self, text, reason, tmp_path):
        path = tmp_path / "some.json"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=f"some.json is damaged .*({reason})"):
            read_json(path)

    def test_oversized(self, tmp_path):
        path = tmp_path / "some.json"
        with path.open("wb") as file:
            file.truncate(MAX_JSON_BYTES + 1)
        with pytest.raises(InputError, match=f"more than {MAX_JSON_BYTES} bytes"):
            read_json(path)

    def test_a_long_log_is_no_attack(self, tmp_path):
        record = RUN | {"history": [{"noise_to_signal": 0.5}] * (MAX_JSON_BYTES // 20)}
        path = tmp_path / "run.json"
        path.write_text(json.dumps(record))
        assert path.stat().st_size > MAX_JSON_BYTES
        assert read_run(path) == record

    @pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity", "9" * 400])
    @pytest.mark.parametrize("word", ["sample_scaler", "degrees_of_freedom", "r", "lora_dropout"])
    def test_numbers_no_float_holds(self, word, number, folder):
        text = json.dumps(MonteCLoRAConfig(r=2).to_dict() | {word: "HERE"}).replace('"HERE"', number)
        with pytest.raises(InputError, match=rf"^{word} \("):
            MonteCLoRAConfig.from_dict(json.loads(text))
        reseal(folder, config=json.loads(text))
        assert opens(folder).startswith(f"{word} (")


# ---- adapter_config.json ----


class TestLoraConfig:
    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"r": 2**40}, "has rank 2, .1099511627776. in the configuration"),
            ({"r": 3}, "has rank 2, .3. in the configuration"),
            ({"r": True}, "r must be an integer"),
            ({"r": "2"}, "r must be an integer"),
            ({"lora_alpha": -1}, "lora_alpha must be a number greater than 0"),
            ({"peft_type": "PROMPT_TUNING"}, 'peft_type must be "LORA"'),
            ({"task_type": ["SEQ_CLS"]}, "task_type must be"),
            ({"task_type": "CAUSAL_LM"}, "does not fit"),
            ({"target_modules": {"query": 1}}, "target_modules must be a string"),
            ({"modules_to_save": ["bert"]}, "'base_model.model.bert.embeddings.word_embeddings.weight' has shape"),
            ({"modules_to_save": [""]}, "modules_to_save must be null or a list of module names"),
            ({"modules_to_save": ["r"]}, "'base_model.model.bert.encoder.layer.0.attention[^']*' has shape"),
            ({"modules_to_save": ["nothing_here"]}, "has no module 'nothing_here'"),
            ({"modules_to_save": ["(a|a)+"]}, "modules_to_save must be"),
            ({"alpha_pattern": {"(.*)*x": 3}}, "alpha_pattern must be"),
            ({"alpha_pattern": {"query": None}}, "alpha_pattern must be"),
            ({"use_dora": True}, "'use_dora' cannot be combined with bayeslora: DoRA reads"),
            ({"megatron_config": {"tensor_model_parallel_size": 1}}, "'megatron_config' cannot be combined"),
            ({"layer_replication": [[0, 10**9]]}, "'layer_replication' cannot be combined"),
            ({"trainable_token_indices": [1]}, "'trainable_token_indices' cannot be combined"),
            ({"monteclora_config": {"buffer_size": 10**12}}, "PEFT's own MonteCLoRA"),
            ({"init_lora_weights": "pissa"}, "change the base weights"),
            ({"word_of_tomorrow": [1]}, "'word_of_tomorrow' cannot be combined with bayeslora: it is unknown"),
            ({"layers_pattern": "layer", "target_modules": "query"}, "not a LoRA configuration PEFT takes"),
        ],
    )
    def test_refused_by_name(self, changes, reason, folder):
        edit_json(folder, **changes)
        with pytest.raises(InputError, match=reason):
            BayesLoRA.from_pretrained(folder, tiny_network())

    @pytest.mark.parametrize("word", ["peft_type", "r", "lora_alpha", "target_modules"])
    def test_missing(self, word, folder):
        values = json.loads((folder / ADAPTER_CONFIG).read_text())
        del values[word]
        (folder / ADAPTER_CONFIG).write_text(json.dumps(values))
        reseal(folder)
        assert f"{word!r} is missing" in opens(folder)

    @pytest.mark.parametrize(
        "changes",
        [
            {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
            {"base_model_name_or_path": "../../../etc/passwd", "revision": "main"},
            {"runtime_config": {"ephemeral_gpu_offload": True}},
            {"fan_in_fan_out": True},
            {"word_of_tomorrow": None},
        ],
    )
    def test_what_says_nothing_about_the_adapter_is_not_used(self, changes, saved, folder):
        edit_json(folder, **changes)
        assert opens(folder) is None
        bayes = BayesLoRA.from_pretrained(folder, tiny_network())
        assert torch.equal(logits(bayes), logits(BayesLoRA.from_pretrained(saved, tiny_network())))
        lora = bayes.network.peft_config["default"]
        assert lora.auto_mapping is None
        assert lora.base_model_name_or_path != "../../../etc/passwd"

    @pytest.mark.parametrize(
        "changes",
        [
            {"target_modules": "(.*.*.*)*x"},
            {"target_modules": "((((((((((.*)*)*)*)*)*)*)*)*)*)*query", "exclude_modules": "(([a-z.0-9]+)*)*!"},
            {"rank_pattern": {"(([a-z.0-9]+)+)+!": 2, "[": 2}},
            {"layers_to_transform": [0, 1], "layers_pattern": ["(([a-z.]+)+)+!"]},
        ],
    )
    def test_patterns_are_kept_and_never_run(self, changes, folder):
        """Each would take longer than the universe on a layer's name; the weights say what is adapted."""
        edit_json(folder, **changes)
        assert opens(folder) is None
        lora = BayesLoRA.from_pretrained(folder, tiny_network()).network.peft_config["default"]
        for word, value in changes.items():
            assert getattr(lora, word) == value

    def test_nothing_is_imported(self, folder, tmp_path, monkeypatch):
        """PEFT imports the module that ``megatron_core`` names where ``megatron_config`` is set."""
        (tmp_path / "megatron").mkdir()
        (tmp_path / "megatron" / "core.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
        monkeypatch.syspath_prepend(tmp_path)
        edit_json(folder, megatron_config={"hidden_size": 1}, megatron_core="megatron.core")
        assert "megatron_config" in opens(folder)
        edit_json(folder, megatron_config=None)
        assert opens(folder) is None
        assert not (tmp_path / "imported").exists()

    def test_ranks_by_layer_survive(self, tmp_path):
        """The file's own ranks are used where the configuration allows for them."""
        fitted(network_options={"layers": 1}, rank_pattern={"query": 3}).save_pretrained(tmp_path / "adapter")
        bayes = BayesLoRA.from_pretrained(tmp_path / "adapter", tiny_network())
        assert {adapter.rank for g in bayes.model.groups for adapter in g.adapters if "query" in adapter.name} == {3}
        edit_json(tmp_path / "adapter", rank_pattern={})
        assert "has rank 3, [2] in the configuration" in opens(tmp_path / "adapter")


# ---- tensors ----


class TestTensors:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("name", [ADAPTER_WEIGHTS, POSTERIOR])
    def test_not_finite(self, name, value, folder):
        chosen = next(iter(load_file(folder / name)))
        edit_tensors(folder, name, lambda tensors: tensors[chosen].view(-1)[0].fill_(value))
        with pytest.raises(InputError, match=rf"tensor '{chosen}' holds NaN or infinity"):
            BayesLoRA.from_pretrained(folder, tiny_network())

    def test_finite_but_out_of_range(self, folder):
        """In float64, too large for float32; and a log v whose exponential no float32 holds."""
        edit_tensors(folder, ADAPTER_WEIGHTS, lambda t: t.update({QUERY_A: t[QUERY_A].double() * 1e300}))
        assert f"tensor {QUERY_A!r} holds NaN or infinity" in opens(folder)

    def test_posterior_that_cannot_be_drawn(self, folder):
        edit_tensors(folder, POSTERIOR, lambda t: t["guide.log_v_r2_in16"].fill_(200))
        assert "is out of the range of torch.float32" in opens(folder)

    @pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "bool", "float8_e4m3fn", "float8_e5m2", "complex64"])
    @pytest.mark.parametrize("name", [ADAPTER_WEIGHTS, POSTERIOR])
    def test_dtype_refused(self, name, dtype, folder):
        chosen = next(iter(load_file(folder / name)))
        edit_tensors(folder, name, lambda t: t.update({chosen: t[chosen].to(getattr(torch, dtype))}))
        with pytest.raises(InputError, match=rf"tensor '{chosen}' has dtype \w+; expected one of F16, BF16, F32, F64"):
            BayesLoRA.from_pretrained(folder, tiny_network())

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_other_floats_are_converted(self, dtype, folder):
        edit_tensors(folder, ADAPTER_WEIGHTS, lambda t: t.update({n: v.to(dtype) for n, v in t.items()}))
        assert opens(folder) is None
        bayes = BayesLoRA.from_pretrained(folder, tiny_network())
        assert {p.dtype for p in bayes.parameters()} == {torch.float32}

    @pytest.mark.parametrize(
        ("name", "change", "reason"),
        [
            (ADAPTER_WEIGHTS, lambda t: t.clear(), "it holds no lora_A at all"),
            (ADAPTER_WEIGHTS, lambda t: t.pop(QUERY_A), r"query.lora_B.weight' has shape None here, \(16, 2\)"),
            (ADAPTER_WEIGHTS, lambda t: t.pop(QUERY_A.replace("_A", "_B")), r"has shape \(16, 2\) here, None"),
            (ADAPTER_WEIGHTS, lambda t: t.update({"extra": torch.zeros(2)}), r"'extra' has shape None here, \(2,\)"),
            (ADAPTER_WEIGHTS, lambda t: t.update({QUERY_A: torch.zeros(2, 17)}), r"\(2, 16\) here, \(2, 17\)"),
            (ADAPTER_WEIGHTS, lambda t: t.update({QUERY_A: torch.zeros(())}), "has rank 0"),
            (ADAPTER_WEIGHTS, lambda t: t.update({QUERY_A: torch.zeros(0, 16)}), "has rank 0"),
            (ADAPTER_WEIGHTS, lambda t: t.update({f"../{QUERY_A}": torch.zeros(2, 16)}), "no linear layer '../base"),
            (
                ADAPTER_WEIGHTS,
                lambda t: t.update({"base_model.model.bert.lora_A.weight": torch.zeros(2, 16)}),
                "no linear layer 'bert'",
            ),
            (POSTERIOR, lambda t: t.update({"guide.extra": torch.zeros(1)}), "'guide.extra' has shape None here"),
            (POSTERIOR, lambda t: t.pop("guide.log_v_r2_in16"), "'guide.log_v_r2_in16' has shape .* None in"),
        ],
    )
    def test_missing_extra_and_misshapen(self, name, change, reason, folder):
        edit_tensors(folder, name, change)
        with pytest.raises(InputError, match=reason):
            BayesLoRA.from_pretrained(folder, tiny_network())

    def test_a_whole_adapter_missing(self, folder):
        """Plain PEFT would start it anew; here the manifest still lists it."""

        def drop(tensors):
            for letter in "AB":
                del tensors[QUERY_A.replace("_A", f"_{letter}")]

        edit_tensors(folder, ADAPTER_WEIGHTS, drop)
        assert f"lists other adapters than {ADAPTER_WEIGHTS} holds" in opens(folder)

    @pytest.mark.parametrize("name", [ADAPTER_WEIGHTS, POSTERIOR])
    def test_pickle_under_the_name(self, name, folder, tmp_path):
        class Payload:
            def __reduce__(self):
                return Path.touch, (tmp_path / "ran",)

        (folder / name).write_bytes(pickle.dumps(Payload()))
        torch.save({"weight": torch.zeros(2)}, tmp_path / "zip")
        for content in (pickle.dumps(Payload()), (tmp_path / "zip").read_bytes()):
            (folder / name).write_bytes(content)
            reseal(folder)
            assert f"{name} is not a readable safetensors file" in opens(folder)
        assert not (tmp_path / "ran").exists()

    def test_pickled_peft_adapter(self, folder):
        """PEFT's old format is a pickle: never opened, here or as the start of a fit."""
        (folder / ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin")
        assert "adapter_model.safetensors is missing" in opens(folder)
        with pytest.raises(InputError, match=r"adapter_model.safetensors is missing"):
            open_peft_adapter(folder, tiny_network())


# ---- memory ----


@contextlib.contextmanager
def little_memory(mebibytes=192):
    """Inside, the process cannot grow by more than this."""
    resource = pytest.importorskip("resource")
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("needs Linux: the limit is set above the present size of the process")
    before = resource.getrlimit(resource.RLIMIT_AS)
    present = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (present + mebibytes * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def claim(folder, name, shape, dtype="F32"):
    """A safetensors file whose header claims far more than follows."""
    size = 4
    for dimension in shape:
        size *= dimension
    header = json.dumps({QUERY_A: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    reseal(folder)


class TestMemory:
    """Nothing is allocated that the files do not hold."""

    def test_the_limit_works(self):
        with little_memory(), pytest.raises((RuntimeError, MemoryError)):
            torch.zeros(2**28)

    @pytest.mark.parametrize(
        "attack",
        [
            lambda f: edit_json(f, r=2**40),
            lambda f: edit_json(f, r=2**28),
            lambda f: edit_json(f, rank_pattern={"query": 2**28, "value": 2**62}),
            lambda f: edit_json(f, modules_to_save=["bert", "encoder", "layer"]),
            lambda f: edit_config(f, num_components=10**12),
            lambda f: edit_config(f, num_components=1024, components="explicit"),
            lambda f: edit_config(f, r=2**40, rank_pattern={"query": 2**40}),
            lambda f: reseal(f, adapters={f"layer.{i}": [2, 16] for i in range(100_000)}),
            lambda f: reseal(f, adapters={QUERY: [2**52, 16]}),
            lambda f: claim(f, ADAPTER_WEIGHTS, [2**58]),
            lambda f: claim(f, POSTERIOR, [2**58, 2**58]),
            lambda f: (f / POSTERIOR).write_bytes(struct.pack("<Q", 2**60) + b"{}") and reseal(f),
        ],
    )
    def test_claims(self, attack, folder):
        attack(folder)
        with little_memory():
            assert opens(folder) is not None

    def test_a_head_that_would_dwarf_the_file(self, folder):
        """A rank the file does hold, on a layer with so few inputs that its other matrix would be gigantic."""
        network = tiny_network()
        network.wide = torch.nn.Linear(1, 2**20, bias=False)
        rank = 2**16
        with another(folder) as attacked:
            edit_json(attacked, r=rank, rank_pattern={"query": 2})
            edit_tensors(
                attacked,
                ADAPTER_WEIGHTS,
                lambda t: t.update(
                    {
                        "base_model.model.wide.lora_A.weight": torch.zeros(rank, 1),
                        "base_model.model.wide.lora_B.weight": torch.zeros(1, rank),
                    }
                ),
            )
            with little_memory(), pytest.raises(InputError, match=rf"lora_B.weight' has shape \({2**20}, {rank}\)"):
                BayesLoRA.from_pretrained(attacked, network)


# ---- the file system ----


class TestFileSystem:
    @pytest.mark.parametrize("name", [*FILES, MANIFEST])
    @pytest.mark.parametrize("kind", ["directory", "fifo", "dangling link", "device"])
    def test_not_a_regular_file(self, kind, name, folder):
        path = folder / name
        path.unlink()
        if kind == "directory":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero" if kind == "device" else folder / "nowhere")
        expected = "plain PEFT adapter" if name == MANIFEST else f"{name} is missing or not a regular file"
        assert expected in opens(folder)
        if name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            assert "holds no" in (found := complaint(open_peft_adapter, folder, tiny_network())) or name in found

    def test_links_are_followed_as_the_hubs_cache_needs(self, saved, folder):
        """A snapshot of the hub's cache is a folder of links to blobs outside it."""
        for name in (*FILES, MANIFEST):
            (folder / name).unlink()
            (folder / name).symlink_to(saved / name)
        assert opens(folder) is None

    @pytest.mark.parametrize("name", [*FILES, MANIFEST])
    def test_a_link_to_a_secret_tells_nothing(self, name, folder, tmp_path):
        (tmp_path / "secret").write_text("the-password\n")
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "secret")
        reseal_what_can_be(folder)
        found = opens(folder)
        assert name in found
        assert "password" not in found

    @pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "/dev/zero"])
    def test_the_manifest_names_no_file_to_open(self, path, folder):
        """Its hashes are looked up by our file names; others are never opened."""
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        del manifest["digest"]
        manifest["sha256"][path] = "0" * 64
        from bayeslora.storage.manifest import digest_of

        (folder / MANIFEST).write_text(json.dumps(manifest | {"digest": digest_of(manifest)}), encoding="utf-8")
        assert opens(folder) is None
        reseal(folder, adapters={path: [2, 16]})
        assert f"has no layer {path!r}" in opens(folder)
        reseal(folder, base=manifest["base"] | {"weights": {path: [0.0] * 16}})
        assert opens(folder) is not None
