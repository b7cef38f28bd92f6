"""The stock `clarifai` command of today and of old, form by form, each user with a home of their own."""

import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.appliance import PATIENCE_S, Appliance, Pki
from support.client_matrix import Matrix
from support.forms import DIGIT, TOPIC, Of, check, says
from support.stock import SAMPLES, executable, plain_environment, run_script, versions

pytestmark = pytest.mark.clients

CLIS = {"sdk-12": "clarifai CLI 12.5.0", "sdk-11": "clarifai CLI 11.0.7", "sdk-10": "clarifai CLI 10.11.1"}
BASE, KEY, CA, TEXT = "{base}", "{key}", "{ca}", "Decision trees are grown on bootstrap samples and vote together."
PICTURE, PICTURE_URL = "{picture}", "{picture_url}"
SITE = "https://clarifai.com/"
DIGITS, TOPICS = "appliance/main/models/digits", "appliance/main/models/ml-topics"
NOT_TRUSTED = "CERTIFICATE_VERIFY_FAILED"
CLOUD = r"api\.clarifai\.com"
NO_DEPLOYMENT = "Deployment 'no-such' not found|does not serve /clarifai.api.V2/GetDeployment"


@dataclass(frozen=True)
class Call:
    """One invocation.

    Attributes:
        form: its row.
        arguments: after `clarifai`.
        expected: an answer's concepts, or what is printed; after a login of an old CLI its config.yaml belongs to it.
        code: its exit code.
        variables: of the environment, beside the one that names the root.
        folder: where it is started, "logged-in" unless it must be another one.
        stdin: what is piped in.
        started: by the command's own start script; the others are forked from a process that did its imports.
    """

    form: str
    arguments: tuple[str, ...]
    expected: Any
    code: int = 0
    variables: dict[str, str] = field(default_factory=dict)
    folder: str = "logged-in"
    stdin: str = ""
    started: bool = False


def predict(form: str, *arguments: str, gives: Any = DIGIT, **rest: Any) -> Call:
    """A call of `clarifai model predict`; its form is what stands after that."""
    return Call(form, ("model", "predict", *arguments), gives, **rest)


def gone(option: str) -> Call:
    """An option that the CLI of today has no more."""
    why = "this CLI has no such option any more (exit code 2)"
    return predict(f"`{option}`", DIGITS, option, "x", gives=says(f"No such option '{option}'", why=why), code=2)


TODAY = (
    Call(
        "`login URL --pat …`",
        ("login", BASE, "--pat", KEY),
        says("Logged in as appliance", "Created context prod-"),
        started=True,
    ),
    Call(
        "`login URL --pat … --user-id … --context …`",
        ("login", BASE, "--pat", KEY, "--user-id", "appliance", "--context", "second"),
        says("Created context second"),
    ),
    Call(
        "`login URL` with `CLARIFAI_PAT`",
        ("login", BASE),
        says("Logged in as appliance"),
        variables={"CLARIFAI_PAT": KEY},
    ),
    Call("`login` with a wrong PAT", ("login", BASE, "--pat", "0" * 64), says("CONN_KEY_INVALID"), code=1),
    Call(
        "`login --config …`",
        ("login", "--config", "login.yaml"),
        says("No such option '--config'", why="this CLI has no such option any more (exit code 2)"),
        code=2,
    ),
    Call("`whoami`", ("whoami",), says("appliance", "https://localhost")),
    Call("`whoami -o json`", ("whoami", "-o", "json"), says('"user_id": "appliance"')),
    Call(
        "`whoami --all`",
        ("whoami", "--all"),
        says("could not fetch full profile", why="the CLI reads a field that its own protocol does not have"),
    ),
    Call("`config view`", ("config", "view"), says("CLARIFAI_API_BASE: https://localhost", "second")),
    Call("`config get-contexts`", ("config", "get-contexts", "-o", "name"), says("second")),
    Call("`config use-context`", ("config", "use-context", "second"), says("Switched to context second")),
    Call("`config current-context`", ("config", "current-context"), says("^second")),
    Call(
        "`config create-context … --base-url … --pat …`",
        ("config", "create-context", "third", "--user-id", "appliance", "--base-url", BASE, "--pat", KEY),
        says("third", "created"),
    ),
    Call("`config delete-context`", ("config", "delete-context", "third"), says("Deleted context third")),
    Call("`config env`", ("config", "env"), says('CLARIFAI_API_BASE="https://localhost')),
    Call("`run`", ("run", "env"), says("CLARIFAI_API_BASE=https://localhost")),
    predict('`model predict user/app/models/model "text"`', TOPICS, TEXT, gives=TOPIC, started=True),
    predict('`model predict https://… "text"`', SITE + TOPICS, TEXT, gives=TOPIC),
    predict("`model predict https://…/versions/1`", f"{SITE}{DIGITS}/versions/1", "--file", PICTURE),
    predict(
        "`model predict user/app/models/model/versions/1`",
        f"{DIGITS}/versions/1",
        "--file",
        PICTURE,
        gives=says("Invalid model reference", why="the CLI reads four parts; name a version by the whole URL"),
        code=2,
    ),
    predict(
        '`model predict … "text" -i max_concepts=3`',
        *(TOPICS, TEXT, "-i", "max_concepts=3"),
        gives=says("Missing required argument: text", why="the CLI drops the text beside -i; write -i text=… too"),
        code=1,
    ),
    predict("the text from a pipe", TOPICS, gives=TOPIC, stdin=TEXT),
    predict("`--model-url`", "--model-url", SITE + TOPICS, "-i", f"text={TEXT}", gives=TOPIC),
    predict("`--model_url`", "--model_url", SITE + TOPICS, "-i", f"text={TEXT}", gives=TOPIC),
    predict("`--file`", DIGITS, "--file", PICTURE),
    predict("`--url`", DIGITS, "--url", PICTURE_URL),
    predict(
        "`-i image=FILE -i max_concepts=3`",
        DIGITS,
        "-i",
        f"image={PICTURE}",
        "-i",
        "max_concepts=3",
        gives=Of("digits", 3),
    ),
    predict("`-i image=URL`", DIGITS, "-i", f"image={PICTURE_URL}"),
    predict("`--file … -i min_value=0.6`", DIGITS, "--file", PICTURE, "-i", "min_value=0.6", gives=Of("digits", 1)),
    predict(
        "`--inputs JSON`", TOPICS, "--inputs", json.dumps({"text": TEXT, "max_concepts": 2}), gives=Of("ml-topics", 2)
    ),
    predict(
        "`--file … --inputs JSON`", DIGITS, "--file", PICTURE, "--inputs", '{"select_concepts": ["4"]}', gives=["4"]
    ),
    predict("`--method predict`", DIGITS, "--method", "predict", "--file", PICTURE),
    predict(
        "`--method` that the model has not",
        DIGITS,
        *("--method", "analyze", "--file", PICTURE),
        gives=says("Method 'analyze' not available. Available methods: .*predict"),
        code=2,
    ),
    predict("`--info`", DIGITS, "--info", gives=says(r"def predict\(image: .*Image, max_concepts: int = 20")),
    predict("`-o json`", DIGITS, "--file", PICTURE, "-o", "json", gives=says(r'^\{"result": "\[Concept\(id=')),
    predict(
        "`--chat`",
        DIGITS,
        *("--chat", "hello"),
        gives=says("does not support OpenAI chat", why="it needs a language model; the appliance serves none yet"),
        code=2,
    ),
    Call(
        "`--context …` before the command",
        ("--context", "second", "model", "predict", DIGITS, "--file", PICTURE),
        DIGIT,
    ),
    predict(
        "`CLARIFAI_PAT` over the context's",
        *(DIGITS, "--file", PICTURE),
        gives=says("CONN_KEY_INVALID"),
        code=1,
        variables={"CLARIFAI_PAT": "0" * 64},
    ),
    predict("an unknown model", "appliance/main/models/no", "x", gives=says("MODEL_DOES_NOT_EXIST"), code=1),
    *(gone(f"--{name}") for name in ("bytes", "file_path", "input_type", "input_id", "inference_params")),
    *(gone(f"--{name}") for name in ("output_config", "config")),
    predict(
        "`--model_id … --user_id … --app_id …`",
        *("--model_id", "digits", "--user_id", "appliance", "--app_id", "main", "--file", PICTURE),
        gives=says("missing 1 required positional argument", why="the CLI crashes on them; name the model by its URL"),
        code=1,
    ),
    predict(
        "`--deployment …`, the address only in the context",
        *(DIGITS, "--deployment", "no-such", "--file", PICTURE),
        gives=says(CLOUD, why="the CLI asks api.clarifai.com who its user is; set CLARIFAI_API_BASE too"),
        code=1,
    ),
    predict(
        "`--deployment …` with `CLARIFAI_API_BASE`, one that is not there",
        *(DIGITS, "--deployment", "no-such", "--file", PICTURE),
        gives=says(NO_DEPLOYMENT),
        code=1,
        variables={"CLARIFAI_API_BASE": BASE},
        started=True,
    ),
    predict(
        "`--deployment_id … --deployment_user_id …`, one that is not there",
        *(DIGITS, "--deployment_id", "no-such", "--deployment_user_id", "appliance", "--file", PICTURE),
        gives=says(NO_DEPLOYMENT),
        code=1,
    ),
    predict(
        "`-cc_id … -np_id … --deployment_user_id …`, ones that are not there",
        *(DIGITS, "-cc_id", "no-such", "-np_id", "no-such", "--deployment_user_id", "appliance", "--file", PICTURE),
        gives=says("Nodepool 'no-such' not found|does not serve /clarifai.api.V2/GetNodepool"),
        code=1,
    ),
    Call(
        "`model list`, the address only in the context",
        ("model", "list"),
        says(CLOUD, why="the CLI ignores the context here and calls api.clarifai.com; set CLARIFAI_API_BASE"),
        code=1,
    ),
    Call(
        "`model list` with `CLARIFAI_API_BASE`",
        ("model", "list"),
        says("digits .*ml-topics"),
        variables={"CLARIFAI_API_BASE": BASE},
        started=True,
    ),
    Call(
        "`model list USER` with `CLARIFAI_API_BASE`",
        ("model", "list", "appliance"),
        says("digits .*ml-topics"),
        variables={"CLARIFAI_API_BASE": BASE},
        started=True,
    ),
    predict(
        "`GRPC_DEFAULT_SSL_ROOTS_FILE_PATH`",
        *(DIGITS, "--file", PICTURE),
        variables={"CLARIFAI_ROOT_CERTIFICATES_PATH": "", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": CA},
    ),
    predict(
        "no root in the environment",
        *(DIGITS, "--file", PICTURE),
        gives=says(NOT_TRUSTED, why="the CLI has no option for it; set CLARIFAI_ROOT_CERTIFICATES_PATH"),
        code=1,
        variables={"CLARIFAI_ROOT_CERTIFICATES_PATH": ""},
    ),
)

BY_IDS = ("--model_id", "digits", "--user_id", "appliance", "--app_id", "main")
TOPICS_BY_IDS = ("--model_id", "ml-topics", *BY_IDS[2:])
BY_URL = ("--model_url", SITE + DIGITS)
PICTURE_FILE = ("--file_path", PICTURE, "--input_type", "image")
USER = {"CLARIFAI_PAT": KEY, "CLARIFAI_USER_ID": "appliance", "CLARIFAI_API_BASE": BASE}
OLD = (
    Call(
        "`login --config login.yaml`",
        ("login", "--config", "login.yaml"),
        says("base_url: https://localhost"),
        started=True,
    ),
    Call(
        "`login`, all from the environment", ("login",), says("base_url: https://localhost"), variables=USER, folder="a"
    ),
    Call(
        "`login --user_id …`",
        ("login", "--user_id", "appliance"),
        says("user_id: appliance"),
        variables=USER,
        folder="b",
    ),
    Call(
        "`login --env prod`",
        ("login", "--env", "prod"),
        says(f"base_url: https://{CLOUD}", why="it means Clarifai's own hosts; leave --env out and give base_url"),
        variables=USER,
        folder="c",
    ),
    predict("`--model_id … --user_id … --app_id … --file_path …`", *BY_IDS, *PICTURE_FILE, started=True),
    predict("`--model_id … --bytes …`", *TOPICS_BY_IDS, "--bytes", TEXT, "--input_type", "text", gives=TOPIC),
    predict("`--model_id … --url …`", *BY_IDS, "--url", PICTURE_URL, "--input_type", "image"),
    predict("`--model_url … --file_path …`", *BY_URL, *PICTURE_FILE),
    predict(
        "`--model_url … --bytes …`", "--model_url", SITE + TOPICS, "--bytes", TEXT, "--input_type", "text", gives=TOPIC
    ),
    predict("`--model_url … --url …`", *BY_URL, "--url", PICTURE_URL, "--input_type", "image"),
    predict("`--model_url …/versions/1`", "--model_url", f"{SITE}{DIGITS}/versions/1", *PICTURE_FILE),
    predict("`--file_path …` without input_type", *BY_IDS, "--file_path", PICTURE),
    predict("`--bytes …` without input_type", *TOPICS_BY_IDS, "--bytes", TEXT, gives=TOPIC),
    predict("`--config predict.yaml`", "--config", "predict.yaml", gives=Of("digits", 3)),
    predict(
        "`--config …` with `output_config` as a mapping",
        *("--config", "mapping.yaml"),
        gives=says("TypeError", why="the CLI wants JSON in a string there: output_config: '{\"max_concepts\": 3}'"),
        code=1,
    ),
    predict(
        "`--inference_params JSON`",
        *(*TOPICS_BY_IDS, "--bytes", TEXT, "--input_type", "text"),
        *("--inference_params", '{"temperature": "0.7", "max_tokens": 100}'),
        gives=TOPIC,
    ),
    predict(
        "`--output_config '{\"max_concepts\": 3}'`",
        *(*BY_URL, *PICTURE_FILE, "--output_config", '{"max_concepts": 3}'),
        gives=Of("digits", 3),
    ),
    predict(
        "`--output_config '{\"min_value\": 0.6}'`",
        *(*BY_URL, *PICTURE_FILE, "--output_config", '{"min_value": 0.6}'),
        gives=Of("digits", 1),
    ),
    predict(
        '`--output_config \'{"select_concepts": [{"id": …}]}\'`',
        *(*BY_URL, *PICTURE_FILE, "--output_config", '{"select_concepts": [{"id": "4"}]}'),
        gives=["4"],
    ),
    predict(
        "`--input_id …`",
        *(*BY_URL, "--input_id", "x"),
        gives=says("AttributeError: get_input", why="the CLI crashes on it before it sends anything"),
        code=1,
    ),
    predict(
        "an unknown model",
        "--model_url",
        f"{SITE}appliance/main/models/no",
        *PICTURE_FILE,
        gives=says("MODEL_DOES_NOT_EXIST"),
        code=1,
    ),
    predict(
        "no login in this folder",
        *(*BY_URL, *PICTURE_FILE),
        gives=says("KeyError: 'pat'", why="it reads ./config.yaml: run `clarifai login` in the same folder"),
        code=1,
        folder="d",
    ),
    predict(
        "`CLARIFAI_ROOT_CERTIFICATES_PATH`",
        *(*BY_URL, *PICTURE_FILE),
        gives=says(NOT_TRUSTED, why="this CLI does not read it; set GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"),
        code=1,
        variables={"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": "", "CLARIFAI_ROOT_CERTIFICATES_PATH": CA},
    ),
)
CALLS = {"sdk-12": TODAY, "sdk-11": OLD, "sdk-10": OLD}
TRUST = {"sdk-12": "CLARIFAI_ROOT_CERTIFICATES_PATH"}
"""How each is told whom to trust; the old ones by gRPC's own variable."""


AFTER_LOGIN = "`Model(…)` without a PAT, after `clarifai login`"
_AFTER_LOGIN = f"""
from clarifai.client.model import Model

model = Model(url="{SITE}{DIGITS}", base_url="{BASE}", root_certificates_path="{CA}")
print(model.predict_by_filepath("{PICTURE}", input_type="image"))
"""


class Station:
    """A user's machine: a home, folders, and what to put for the marks in the calls."""

    def __init__(self, environment: str, home: Path, native: Appliance, pki: Pki, web: str) -> None:
        self.environment, self.home, self._native = environment, home, native
        picture = sorted(SAMPLES.glob("*.png"))[0]
        self._marks = {
            BASE: f"https://localhost:{native.port()}",
            KEY: native.key,
            CA: str(pki.ca),
            PICTURE: str(picture),
            PICTURE_URL: f"{web}/{picture.name}",
        }
        for call in CALLS[environment]:
            (home / call.folder).mkdir(exist_ok=True, parents=True)
        files = {
            "login.yaml": f"user_id: appliance\npat: {KEY}\nbase_url: {BASE}\n",
            "predict.yaml": "model_id: digits\nuser_id: appliance\napp_id: main\ninput_type: image\n"
            f"file_path: {PICTURE}\noutput_config: '{{\"max_concepts\": 3}}'\n",
            "mapping.yaml": f"model_url: {SITE}{DIGITS}\nfile_path: {PICTURE}\noutput_config:\n  max_concepts: 3\n",
        }
        for name, content in files.items():
            (home / "logged-in" / name).write_text(self.filled(content), encoding="utf-8")

    def filled(self, text: str) -> str:
        """With what the marks stand for."""
        for mark, value in self._marks.items():
            text = text.replace(mark, value)
        return text

    def variables(self, call: Call) -> dict[str, str]:
        """The environment of a call; a variable that is empty is left out."""
        trust = {TRUST.get(self.environment, "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"): CA}
        return {name: self.filled(value) for name, value in (trust | call.variables).items() if value}

    def run(self) -> dict[str, list[Any]]:
        """All calls in turn, those of the start script first; by form, exit code and what was printed."""
        calls = [
            [
                call.form,
                [self.filled(text) for text in call.arguments],
                self.variables(call),
                str(self.home / call.folder),
                call.stdin,
            ]
            for call in sorted(CALLS[self.environment], key=lambda call: not call.started)
        ]
        started = sum(call.started for call in CALLS[self.environment])
        found = {call[0]: self._start(*call[1:]) for call in calls[:started]}
        found |= run_script(self.environment, "script_cli.py", json.dumps(calls[started:]), HOME=self.home)
        if self.environment == "sdk-12":
            found[AFTER_LOGIN] = self._python(_AFTER_LOGIN)
        return found

    def _python(self, script: str) -> list[Any]:
        done = subprocess.run(
            [executable(self.environment), "-c", self.filled(script)],
            capture_output=True,
            text=True,
            env=plain_environment(HOME=self.home),
            timeout=PATIENCE_S,
            check=False,
        )
        return [done.returncode, done.stdout, done.stderr]

    def _start(self, arguments: list[str], variables: dict[str, str], folder: str, stdin: str) -> list[Any]:
        done = subprocess.run(
            [executable(self.environment, "clarifai"), *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            env=plain_environment(HOME=self.home, **variables),
            cwd=folder,
            timeout=PATIENCE_S,
            check=False,
        )
        return [done.returncode, done.stdout, done.stderr]

    def config_of(self, call: Call) -> str:
        """The config.yaml that a login of an old CLI left."""
        file = self.home / call.folder / "config.yaml"
        return file.read_text(encoding="utf-8") if call.arguments[0] == "login" and file.exists() else ""


@pytest.fixture(scope="module")
def found(
    native: Appliance, pki: Pki, web: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], list[Any]]:
    """By environment and form: exit code, stdout with what a login wrote, stderr."""
    stations = [Station(name, tmp_path_factory.mktemp(name), native, pki, web) for name in CLIS]
    with ThreadPoolExecutor(len(stations)) as pool:
        answers = list(pool.map(Station.run, stations))
    found = {
        (station.environment, call.form): [code, f"{out}{station.config_of(call)}", errors]
        for station, answer in zip(stations, answers, strict=True)
        for call in CALLS[station.environment]
        for code, out, errors in [answer[call.form]]
    }
    return found | {("sdk-12", AFTER_LOGIN): answers[0][AFTER_LOGIN]}


@pytest.mark.parametrize(
    ("environment", "call"),
    [(environment, call) for environment in CLIS for call in CALLS[environment]],
    ids=lambda value: value.form if isinstance(value, Call) else value,
)
def test_form(
    environment: str,
    call: Call,
    found: dict[tuple[str, str], list[Any]],
    truth: dict[str, list[str]],
    matrix: Matrix,
) -> None:
    """It prints what the raw stub reads, or what its user should read."""
    code, out, errors = found[environment, call.form]
    assert code == call.code, errors
    check(out + errors if hasattr(call.expected, "words") else concepts(out), call.expected, truth)
    matrix.row(CLIS[environment], call.form, why=getattr(call.expected, "why", ""))
    matrix.version(CLIS[environment], versions(environment, "clarifai", "clarifai-grpc", "grpcio", "protobuf"))


def test_the_sdk_takes_its_pat_from_a_login(
    found: dict[tuple[str, str], list[Any]], truth: dict[str, list[str]], matrix: Matrix
) -> None:
    """It reads the context that the command wrote; the address and the root are still its caller's to give."""
    code, out, errors = found["sdk-12", AFTER_LOGIN]
    assert code == 0, errors
    assert concepts(out) == truth["digits"]
    matrix.row("Python SDK 12.5.0", AFTER_LOGIN)


def concepts(printed: str) -> list[str]:
    """Concept ids, as the CLI of today and the old ones print them."""
    return re.findall(r"Concept\(id='([^']+)'", printed) or re.findall(r'concepts \{\s+id: "([^"]+)"', printed)
