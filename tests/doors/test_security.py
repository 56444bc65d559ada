"""What comes from others is data: it runs nothing, names no path, steers no terminal and costs no more than it says.

docs/security.md lists what is trusted and what is not, and which test tries each.
"""

from __future__ import annotations

import ast
import hmac
import inspect
import json
import logging
import struct
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fakes import FakeServing, served

import plures
from packed import SITES, fitted, fleet
from plures.adapt import adapts
from plures.bridges.adapter_folder import CONFIG, read_folder
from plures.cli import serve
from plures.cli.app import main
from plures.core.errors import BadInput, WrongUse
from plures.engine.choose import Grammars
from plures.engine.model import empty_base, encode_prompt, linear_names, load_base, load_tokenizer, locate, weight_files
from plures.flows.bench_report import summarise, write_report
from plures.flows.desk import Desk
from plures.flows.merge_recipe import load as load_merge
from plures.pack import packs
from plures.server.app import make_app
from plures.server.loopback import check_open
from plures.server.run import Doors, Service
from plures.store import Store
from plures.store.access import Access, Tenant
from plures.store.versions import Score
from plures.tensors import safe
from plures.tensors.variant import BaseRef
from plures.tensors.weights import Weights
from tiny import make_base, write_rows

SOURCE = Path(plures.__file__).parent
EVIL = "<script>document.title='bad'</script>"
CHAT: dict[str, Any] = {"model": "mos", "messages": [{"role": "user", "content": "hi"}]}


# ---------------------------------------------------------------- code


def test_nothing_here_runs_what_a_file_says() -> None:
    """No pickle is loaded, no text is evaluated, no shell is called, and no remote code is trusted."""
    bad = {"eval", "exec", "os.system", "os.popen", "torch.load", "pickle.load", "pickle.loads", "np.load",
           "numpy.load", "yaml.unsafe_load", "yaml.full_load", "joblib.load", "marshal.loads"}  # fmt: skip
    looked = 0
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            looked += 1
            where = f"{file.name}:{node.lineno}"
            assert ast.unparse(node.func) not in bad, where
            for word in node.keywords:
                said = ast.unparse(word.value)
                assert not (word.arg in ("shell", "trust_remote_code", "allow_pickle") and said != "False"), where
            if ast.unparse(node.func) == "yaml.load":
                assert [ast.unparse(w.value) for w in node.keywords] == ["_loader()"], where
    assert looked > 10_000


@pytest.mark.parametrize("kind", ["llama", "unheard_of"])
def test_code_beside_a_base_is_not_run(tmp_path: Path, kind: str) -> None:
    ran, base = tmp_path / "ran", make_base(tmp_path / "base")
    for name in ("config.json", "tokenizer_config.json"):
        said = json.loads((base / name).read_text())
        said["auto_map"] = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C", "AutoTokenizer": ["evil.C"] * 2}
        if name == "config.json":
            said["model_type"] = kind
        (base / name).write_text(json.dumps(said))
    for name in ("evil.py", "setup.py", "__init__.py", "modeling_llama.py"):
        (base / name).write_text(f"open({str(ran)!r}, 'w').close()\nclass C: pass\n")
    ref = BaseRef(str(base), "", "")
    if kind == "llama":
        load_base(ref)
    else:
        with pytest.raises(BadInput, match="cannot be loaded"):
            load_base(ref)
    assert not ran.exists()


def test_a_chat_template_is_kept_in_its_box(tmp_path: Path) -> None:
    made = make_base(tmp_path / "base")
    base = load_tokenizer(BaseRef(str(made), "", ""))
    for template in (
        "{{ messages.__class__.__mro__[1].__subclasses__() }}", "{{ ''.__class__.__base__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}", "{{ messages.append(1) }}{{ messages.clear() }}",
    ):  # fmt: skip
        base.tokenizer.chat_template = template
        with pytest.raises(WrongUse, match=r"the chat template of base .* refuses"):
            encode_prompt(base, [{"role": "user", "content": "hi"}])


# ---------------------------------------------------------------- files from others


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/model.safetensors", "..", "a/b.safetensors", 5,
                                  "x/../model.safetensors", "", None])  # fmt: skip
def test_an_index_names_files_of_its_own_folder_alone(tmp_path: Path, name: Any) -> None:
    other, base = make_base(tmp_path / "other", seed=1), make_base(tmp_path / "base")
    (base / "model.safetensors").unlink()
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    for read in (weight_files, Weights, lambda p: load_base(BaseRef(str(p), "", ""))):
        with pytest.raises(BadInput, match=r"of its own folder alone|is no index"):
            read(base)
    for text in ("[" * 100_000, "[]", '{"weight_map": []}', "\xff"):
        index.write_text(text, encoding="latin-1")
        for read in (weight_files, Weights):
            with pytest.raises(BadInput):
                read(base)
    assert weight_files(other)


@pytest.mark.parametrize("span", [[-8, 8], [8, 0], [0.0, 8.0], [True, 8], ["0", "8"], [0], None, [1 << 70, 1 << 71]])
def test_a_header_whose_spans_cannot_be_is_refused(tmp_path: Path, span: Any) -> None:
    def written(of: Any, data: bytes = bytes(8)) -> Path:
        text = json.dumps({"t": {"dtype": "F32", "shape": [2], "data_offsets": of}}).encode()
        path = tmp_path / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        return path

    assert safe.header(written([0, 8])) and Weights(tmp_path).names == ["t"]
    with pytest.raises(BadInput):
        safe.read(written(span))
    if span not in ([True, 8], ["0", "8"], [0.0, 8.0]):
        with pytest.raises(BadInput):
            Weights(tmp_path)


def test_a_header_that_claims_much_takes_little(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for claim in (1 << 63, 1 << 40, 99_000_000):
        path.write_bytes(struct.pack("<Q", claim) + b"{}")
        began = time.monotonic()
        for read in (safe.header, Weights):
            with pytest.raises(BadInput):
                read(path)
        assert time.monotonic() - began < 1
    text = json.dumps({"t": {"dtype": "F32", "shape": [-1, -(1 << 40)], "data_offsets": [0, 0]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(BadInput):
        Weights(path)


HEAVY = ["(a+)+$", "(.*)*x", "(a|a)(a|a)(a|a)x", ".*.*.*.*.*x", "a?a?a?a?a?a", "(?:.*)+", "x" * 3000, "(l|(a|b)|(c|d))"]


@pytest.mark.parametrize("pattern", HEAVY)
def test_a_pattern_that_could_take_for_ever_is_not_tried(
    trained_fleet: Path, tmp_path: Path, pattern: str
) -> None:
    with plures.Fleet(trained_fleet) as opened:
        out, base = opened["lora"].export(tmp_path / "out"), empty_base(opened.store.base)
        ref, shapes = opened.store.base, linear_names(base)
    whole = {k: tuple(t.shape) for k, t in base.state_dict().items()}
    (out / "plures.json").unlink()
    said = json.loads((out / CONFIG).read_text())
    for fine in (r"layers\.\d+\.q_proj", r"^model\.layers\.(0|1|2)\.self_attn\.(q|k)_proj", "q_proj", ".*q_proj$"):
        (out / CONFIG).write_text(json.dumps(said | {"rank_pattern": {fine: said["r"]}}))
        assert read_folder(out, ref, shapes, whole).method == "lora"
    for key in ("rank_pattern", "alpha_pattern"):
        (out / CONFIG).write_text(json.dumps(said | {key: {pattern: said["r"]}}))
        with pytest.raises(BadInput, match="could take for ever"):
            read_folder(out, ref, shapes, whole)


@pytest.mark.parametrize("name", ["a/..", "-x/y", "a..b", "x/--y", "../x", "/no/such", "~/none", "a/b/c", "org/na me",
                                  "http://x/y", "a\x00b", "org/model\n"])  # fmt: skip
def test_a_hub_id_is_one_or_nothing_is_asked(name: str) -> None:
    with pytest.raises(BadInput) as caught:
        locate(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [
    b"!!python/object/apply:os.system [id]\n", b"merge_method: !!python/name:os.system\n", b"a: &x [*x]\n",
    b"merge_method: \xff\n", b"a: [" * 3000, b"- a\n", b"", b"parameters: {x: " + b"9" * 5000 + b"}\n",
    b"a0: &a0 [1]\n" + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 9)),
])  # fmt: skip
def test_a_merge_recipe_is_plain_yaml(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "r.yaml").write_bytes(text)
    with pytest.raises(BadInput) as caught:
        load_merge(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)
    (tmp_path / "r.yaml").write_text("merge_method: linear\nmodels: [{model: a, parameters: &p {weight: 1}}, "
                                     "{model: b, parameters: *p}]\n")  # fmt: skip
    assert len(load_merge(tmp_path / "r.yaml").models) == 2


@pytest.mark.parametrize("name", sorted(packs))
def test_a_packed_code_makes_no_more_than_its_sites_hold(name: str) -> None:
    codec = fitted(name, fleet("trained", n=6))
    most = max(min(s.out, s.into) for s in SITES)
    rng, told, heads = np.random.default_rng(0), 0, [b"\xff" * 8, b"\x00" * 8, b"\x7f" * 4, b""]
    plain = codec.encode(fleet("trained", n=6)[0]).numpy()
    for i in range(120):
        data = rng.integers(0, 256, int(rng.integers(1, 300)), dtype=np.uint8)
        if i % 3 == 0:
            data = plain.copy()
            data[rng.integers(len(data), size=3)] ^= rng.integers(1, 256, 3, dtype=np.uint8)
        elif i % 3 == 1:
            head = np.frombuffer(heads[i % 4], np.uint8)
            data = np.concatenate([head, data])
        try:
            found = codec.decode(torch.from_numpy(data))
        except BadInput:
            told += 1
            continue
        assert all(B.shape[1] == A.shape[0] <= max(most, 64) for B, A in found.values())
    assert told > 60


def test_a_schema_that_is_nested_too_deep_is_refused(base_folder: Path) -> None:
    grammars = Grammars(load_tokenizer(BaseRef(str(base_folder), "", "")).tokenizer)
    deep = '{"type": "object", "properties": {"a": ' * 3000 + "{}" + "}}" * 3000
    with pytest.raises(WrongUse, match="the JSON schema cannot be followed"):
        grammars.make(deep)
    began = time.monotonic()
    for heavy in ({"type": "string", "pattern": "^(a+)+$"}, {"type": "string", "pattern": "(a{1,1000}){1,1000}"},
                  {"type": "string", "maxLength": 10**9}):  # fmt: skip
        grammars.make(json.dumps(heavy))
    assert time.monotonic() - began < 5


# ---------------------------------------------------------------- what is shown


def test_text_of_rows_and_names_is_text_in_reports(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ({"text": f"{EVIL} {i}", EVIL: i} for i in range(40)))
    argv = ["select", str(rows), "-b", "4", "-m", "random", "-o", str(tmp_path / "out.jsonl"),
            f"report={tmp_path / 'page.html'}"]  # fmt: skip
    with pytest.raises(SystemExit) as done:
        main(argv)
    assert done.value.code == 0
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 4
    one = {"method": EVIL, "peft": False, "options": {}, "trained": 10, "step_cpu_s": 0.1, "more_mb": 1.0, "zero": 2.0}
    cells = [{**one, "contender": name, "tenant": tenant, "seed": 0, "bits_per_byte": 1.0 + i}
             for i, name in enumerate((EVIL, "lora")) for tenant in ("acme", EVIL)]  # fmt: skip
    told = summarise(cells, {EVIL: 0.1, "lora": 0.1}) | {
        "recipe": {"steps": 1}, "search_tenant": EVIL, "notes": {EVIL: EVIL}, "ablations": {}}  # fmt: skip
    write_report(tmp_path / "bench", told, cells)
    page = (tmp_path / "bench" / "report.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 6


def test_what_files_say_steers_no_terminal(own_fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steer = "\x1b]0;owned\x07\x1b[2J\r\x9b1A\u202e"
    with Store.open(own_fleet) as store:
        evil = store.load("lora").with_provenance(seed=steer, data=steer)
        store.publish(evil, "evil", note=steer, scores=[Score(steer, "m", 1.0, {})])
    for argv in (["show", "evil"], ["list"], ["show", f"evil{steer}"], ["import", f"/no/{steer}", "--name", "x"]):
        with pytest.raises(SystemExit):
            main([*argv, "--fleet", str(own_fleet)])
        told = capsys.readouterr()
        assert not set("\x1b\x07\r\x9b\u202e") & set(told.out + told.err), argv
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"what": steer}) + "\n")
    with pytest.raises(SystemExit):
        main(["train", f"fleet={own_fleet}", "name=x", f"data.train={rows}"])
    assert not set("\x1b\x07\r\x9b") & set(capsys.readouterr().err)


# ---------------------------------------------------------------- the store


def test_text_is_never_sql(own_fleet: Path) -> None:
    sql = "x'; DROP TABLE version; --"
    with Store.open(own_fleet) as store, Access.open(own_fleet) as access:
        before = {v.ref: v.identity for v in store.versions(all=True)}
        for call in (store.resolve, store.load, store.remove, store.versions, store.scores, store.lineage):
            for said in (sql, f"mos@{sql}", "mos@1; DROP TABLE version", 'mos"', "mos%"):
                with pytest.raises(WrongUse):
                    call(said)
        store.score("mos", sql, sql, 1.0, note=sql)
        assert [(s.dataset, s.metric) for s in store.scores("mos") if s.dataset == sql] == [(sql, sql)]
        other = store.load("mos").with_provenance(note=sql)
        assert store.publish(other, "quoted", note=sql).note == sql
        access.put_tenant(Tenant("acme", (sql,)), sql)
        assert access.tenant("acme").variants == (sql,) and access.log(1)[0]["by"] == sql
        key, _ = access.make_key("acme", "me", note=sql)
        assert key.note == sql and access.who(sql) is None
        with pytest.raises(WrongUse):
            access.revoke(f"{key.id}' OR '1'='1", "me")
        assert before.items() <= {v.ref: v.identity for v in store.versions(all=True)}.items() and store.fsck().ok


# ---------------------------------------------------------------- the server


def test_a_key_is_compared_in_constant_time(own_desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    own_desk.access.put_tenant(Tenant("acme"), "me")
    key, secret = own_desk.access.make_key("acme", "me")
    compared, real = list[tuple[int, int]](), hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert own_desk.access.who(secret) == key
    assert own_desk.access.who(secret[:-1] + ("a" if secret[-1] != "a" else "b")) is None
    assert compared == [(32, 32)] * 2  # hashes, never the secret itself


def test_it_listens_on_the_loopback_unless_told_otherwise() -> None:
    for of in (Service.__init__, serve.command):
        assert inspect.signature(of).parameters["host"].default == "127.0.0.1"
    assert inspect.signature(Service.__init__).parameters["open"].default is False
    assert inspect.signature(Service.__init__).parameters["admin_port"].default is None
    for host in ("0.0.0.0", "::", "192.168.0.2", "example.com", ""):
        with pytest.raises(WrongUse, match="would answer everybody"):
            check_open(host, True)
        check_open(host, False)


def test_without_keys_no_page_of_another_site_is_answered(own_desk: Desk) -> None:
    doors = Doors(own_desk, FakeServing(), host="127.0.0.1", port=0, admin_port=0, open=True)
    doors.start()
    try:
        url, port = doors.url(0), httpx.URL(doors.url(0)).port
        with httpx.Client(base_url=url) as http:
            for sent in ({"host": f"evil.example:{port}"}, {"origin": "https://evil.example"}, {"origin": "null"},
                         {"host": "localhost.evil.example"}, {"host": "127.0.0.1.evil.example"}, {"host": "["},
                         {"host": "127.0.0.1@evil.example"}, {"origin": "http://127.0.0.1:1@evil.com"}):  # fmt: skip
                for path in ("/v1/models", "/status.json", "/", "/metrics"):
                    assert http.get(path, headers=sent).status_code in (400, 403), sent
                answer = http.post("/v1/chat/completions", json=CHAT, headers=sent)
                assert answer.status_code in (400, 403)
            for sent in ({"host": f"localhost:{port}"}, {"origin": f"http://localhost:{port}"}, {"host": "[::1]:80"}):
                assert http.post("/v1/chat/completions", json=CHAT, headers=sent).status_code == 200, sent
        with httpx.Client(base_url=doors.url(1)) as http:  # the administration has keys all the same
            assert http.get("/admin/variants").status_code == 401
    finally:
        doors.stop(5)


def test_a_server_with_keys_answers_by_any_name_and_lets_no_other_site_read(own_desk: Desk) -> None:
    own_desk.access.put_tenant(Tenant("acme"), "me")
    secret = own_desk.access.make_key("acme", "me")[1]
    with served(make_app(own_desk, FakeServing())) as url, httpx.Client(base_url=url) as http:
        headers = {"authorization": f"Bearer {secret}", "host": "models.example", "origin": "https://evil.example"}
        answer = http.get("/v1/models", headers=headers)
        assert answer.status_code == 200
        assert not [h for h in answer.headers if h.startswith("access-control-")]
        assert http.options("/v1/models", headers={"origin": "https://evil.example"}).status_code == 405


def test_no_prompt_and_no_key_is_in_the_log(
    own_desk: Desk, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    own_desk.access.put_tenant(Tenant("acme"), "me")
    secret = own_desk.access.make_key("acme", "me")[1]
    marker = "zebra-7391"
    chat = {"model": "mos", "messages": [{"role": "user", "content": f"{marker}\nINFO forged line"}]}
    serving = FakeServing()
    caplog.set_level(logging.DEBUG)
    with served(make_app(own_desk, serving)) as url, httpx.Client(base_url=url) as http:
        logging.getLogger("uvicorn").setLevel(logging.DEBUG)
        caplog.clear()
        headers = {"authorization": f"Bearer {secret}", "connection": "close"}
        for change, status in (({}, 200), ({"model": f"{marker}\n"}, 404), ({"temperature": marker}, 400)):
            assert http.post("/v1/chat/completions", json=chat | change, headers=headers).status_code == status
        serving.refusal = ZeroDivisionError("a bug")
        assert http.post("/v1/chat/completions", json=chat, headers=headers).status_code == 500
        http.get("/v1/models", headers={"authorization": f"Bearer {secret}x"})
    said = capfd.readouterr()
    records = [r for r in caplog.records if not r.name.startswith(("httpx", "httpcore"))]
    ours = "\n".join(r.getMessage() + str(r.exc_info) for r in records)
    for text in (said.out, said.err, ours):
        assert marker not in text and secret not in text and secret.split("-")[2] not in text


def test_methods_of_an_adapter_are_those_that_are_installed(trained_fleet: Path, tmp_path: Path) -> None:
    with plures.Fleet(trained_fleet) as opened:
        out, base, ref = opened["mos"].export(tmp_path / "out"), empty_base(opened.store.base), opened.store.base
    whole, shapes = {k: tuple(t.shape) for k, t in base.state_dict().items()}, linear_names(base)
    (out / "plures.json").unlink()
    said = json.loads((out / CONFIG).read_text())
    for name in ("os", "packed", "../mos", "mos.py", "_lay", "plures.adapt.mos", "", "__init__"):
        assert name not in adapts
        (out / CONFIG).write_text(json.dumps(said | {"method": name}))
        with pytest.raises(BadInput):
            read_folder(out, ref, shapes, whole)
