// The status page: asks for /status.json every two seconds and shows it. What the appliance says is data: it becomes
// text and attributes, never markup. A part of the page is built anew only when what it shows has changed, so that
// focus and selection stay where they are. Keys are in variables of this page, and nowhere else.
"use strict";

const POLL_MS = 2000, AGAIN_MS = 4000, PATIENCE_MS = 10000, TRY_PATIENCE_MS = 90000;
const FEW = 50; // models shown at first
const MOST_FILE = 5 * 2 ** 20; // bytes of a picture; base64 makes it a third longer, and the appliance takes 8 MiB
const SIGNS = { healthy: ["●", "good"], degraded: ["▲", "warn"], unhealthy: ["✕", "bad"] };
const STATES = { ready: "good", settling: "soft", loading: "warn", failed: "bad", held: "soft" };

const byId = (id) => document.getElementById(id);
const shown = new Map(); // id → what it shows, as JSON
let readerKey = "", latest = null, health = "", lost = false, asking = false, all = false, timer = 0, sparks = null;

// ---- texts ----

const number = (value, digits = 0) =>
  value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });

function rate(value) {
  return value === null ? "–" : number(value, value > 0 && value < 100 ? 1 : 0);
}

function duration(seconds) {
  if (seconds === null) return "–";
  for (const [unit, size] of [["s", 1], ["ms", 1e-3]]) {
    if (seconds >= size) return `${number(seconds / size, seconds / size < 100 ? 1 : 0)} ${unit}`;
  }
  return `${number(seconds * 1e6)} µs`;
}

function bytes(count) {
  if (count === null) return "–";
  for (const [unit, size] of [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (count >= size) return `${number(count / size, 1)} ${unit}`;
  }
  return `${count} B`;
}

function span(seconds) {
  for (const [unit, size] of [["days", 86400], ["hours", 3600], ["min", 60]]) {
    if (seconds >= 2 * size) return `${number(Math.floor(seconds / size))} ${unit}`;
  }
  return `${number(Math.max(0, seconds))} s`;
}

const moment = (at) => new Date(at * 1000).toISOString().replace("T", " ").replace(/\..*/, " UTC");
const share = (value) => (value === null ? "–" : `${number(100 * value)} %`);

// ---- elements ----

function element(name, options = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(options)) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== ""));
  return made;
}

function fill(id, data, build) {
  const text = JSON.stringify(data);
  if (shown.get(id) === text) return;
  shown.set(id, text);
  byId(id).replaceChildren(...build(data));
}

const list = (id, pairs) =>
  fill(id, pairs, () => pairs.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));

function table(id, caption, heads, rows) {
  fill(id, [heads, rows], () => {
    if (!rows.length) return [];
    const kind = (cell) => (typeof cell === "object" ? cell : { text: cell });
    const cellOf = (cell, index) => {
      const { text, style = "" } = kind(cell);
      const options = style ? { class: style } : {};
      return index ? element("td", options, text) : element("th", { scope: "row", ...options }, text);
    };
    const head = heads.map((name, index) =>
      element("th", { scope: "col", ...(rows[0][index]?.style === "number" ? { class: "number" } : {}) }, name));
    return [
      element("caption", { class: "hidden" }, caption),
      element("thead", {}, element("tr", {}, ...head)),
      element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map(cellOf)))),
    ];
  });
}

const right = (text) => ({ text, style: "number" });

function say(text) {
  byId("said").textContent = text;
}

// ---- sparklines ----

const SPARKS = [
  ["Calls a second", "requests_per_s", rate],
  ["Failures a second", "failures_per_s", rate],
  ["Latency p50", "p50_s", duration],
  ["Latency p99", "p99_s", duration],
];

function drawSparks(history) {
  const svg = (name, options) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(options)) made.setAttribute(key, value);
    return made;
  };
  if (!sparks) {
    sparks = SPARKS.map(([title]) => {
      const now = element("strong"), picture = svg("svg", { role: "img", preserveAspectRatio: "none" });
      const area = svg("path", { class: "area" }), line = svg("path", { class: "line" });
      picture.append(area, line);
      byId("sparks").append(element("div", {}, element("p", {}, title, " ", now), picture));
      return { now, picture, area, line };
    });
  }
  SPARKS.forEach(([title, name, text], place) => {
    const values = history[name], { now, picture, area, line } = sparks[place];
    const most = Math.max(...values.filter((value) => value !== null), 0);
    const last = values.at(-1), peak = text(most || null);
    now.textContent = text(last);
    const minutes = number((values.length * history.step_s) / 60);
    picture.setAttribute("viewBox", `0 0 ${values.length - 1} 100`);
    picture.setAttribute("aria-label", `${title}: ${text(last)} now, at most ${peak} in ${minutes} minutes`);
    const height = (value) => (95 - (90 * value) / (most || 1)).toFixed(1);
    let top = "", ground = "", begun = -1;
    for (let x = 0; x <= values.length; x += 1) {
      const value = values[x] ?? null;
      if (value !== null && begun < 0) [begun, top, ground] = [x, `${top}M${x} ${height(value)}h.01`, `${ground}M${x} 100`];
      if (value !== null) [top, ground] = [`${top}L${x} ${height(value)}`, `${ground}L${x} ${height(value)}`];
      if (value === null && begun >= 0) [begun, ground] = [-1, `${ground}L${x - 1} 100Z`];
    }
    line.setAttribute("d", top);
    area.setAttribute("d", ground);
  });
}

// ---- the document ----

function show(status) {
  latest = status;
  document.title = `${status.health}: ${status.host}`;
  byId("host").textContent = status.host;
  byId("about").textContent =
    `${status.version}, up for ${span(status.at - status.started_at)}; clients: ${status.base_url}`;
  byId("foot").textContent = `As of ${moment(status.at)}; /status.json, version ${status.format}.`;
  showHealth(status);
  drawSparks(status.history);
  const load = status.load;
  list("load", [
    ["In flight", number(load.in_flight)],
    ["Connections", number(load.connections)],
    ["Memory of requests", `${bytes(load.memory_in_flight_bytes)} of ${bytes(load.memory_in_flight_limit_bytes)}`],
    ["Lost since the start", number(load.lost)],
    ["Refused since the start",
      Object.entries(load.refused).map(([why, count]) => `${why} ${number(count)}`).join(", ") || "none"],
  ]);
  byId("device").textContent = status.device;
  table("devices", "Devices", ["Device", "Load", "Memory", "°C", "W"], status.devices.map((each) => [
    each.name, right(share(each.load)), right(`${bytes(each.memory_used_bytes)} of ${bytes(each.memory_total_bytes)}`),
    right(each.temperature_celsius === null ? "–" : number(each.temperature_celsius)),
    right(each.power_watts === null ? "–" : number(each.power_watts)),
  ]));
  fill("processes", status.processes, (found) => found.map((each) => each.problem
    ? element("li", { class: "bad" }, `✕ ${each.name}: ${each.problem}`)
    : element("li", {}, `● ${each.name}, process ${each.pid}`)));
  list("disks", status.disks.map((each) =>
    [`Disk of ${each.name}`, `${bytes(each.free_bytes)} of ${bytes(each.size_bytes)} free`]));
  showModels();
  list("certificates", [
    ...status.certificates.map((each) => [each.name, ends(each.at, status.at, "ends", "has ended")]),
    ...status.revocation_lists.map((each) =>
      [`revocation list of ${each.name}`, ends(each.at, status.at, "is due", "is out of date")]),
    ["Valid keys", number(status.keys)],
  ]);
  showOrchestrator(status.orchestrator);
  table("failures", "The last call of each kind that failed", ["When", "Code", "Model", "Method", "How many", "Request"],
    status.failures.map((each) => [
      moment(each.at), `${each.code} ${each.name}`, [each.model, each.version].filter(Boolean).join(" ") || "–",
      each.method, right(number(each.count)), each.req_id,
    ]));
  fill("log", status.log, (lines) => lines.length
    ? lines.map((each) => element("li", {},
      element("span", { class: each.level === "warning" ? "warn" : "bad" }, each.level),
      ` ${moment(each.at)} ${each.text}`))
    : [element("li", {}, "The daemon's own process has written no warnings.")]);
  offer(status);
}

function showHealth(status) {
  const [sign, style] = SIGNS[status.health];
  const line = byId("health");
  line.className = `health ${style}`;
  line.textContent = `${sign} ${status.health}`;
  const reasons = status.reasons.map((each) => [each.what, each.why, each.runbook]);
  const skew = status.at - Date.now() / 1000;
  if (Math.abs(skew) > 30) {
    reasons.push(["clock", `it differs from this browser's by ${span(Math.abs(skew))}`, "clock-skew"]);
  }
  fill("reasons", [reasons, status.more_reasons], () => [
    ...reasons.map(([what, why, page]) => element("li", {},
      element("strong", {}, what), `: ${why}`, page ? element("span", { class: "soft" }, ` (docs/runbook/${page}.md)`) : "")),
    ...(status.more_reasons ? [element("li", {}, `and ${number(status.more_reasons)} more`)] : []),
  ]);
  if (health !== status.health) say([`The appliance is ${status.health}`, ...reasons.map(([what, why]) => `${what}: ${why}`)].join(". "));
  health = status.health;
}

function ends(at, now, will, has) {
  return at > now ? `${will} in ${span(at - now)}, ${moment(at)}` : `${has}, ${moment(at)}`;
}

function showModels() {
  const words = byId("filter").value.trim().toLowerCase();
  const rank = (each) => (each.state === "failed" ? 0 : each.state === "ready" ? 2 : 1);
  const found = latest.models
    .filter((each) => !words || `${each.bundle} ${each.model} ${each.version} ${each.state}`.toLowerCase().includes(words))
    .sort((a, b) => rank(a) - rank(b));
  const some = all ? found : found.slice(0, FEW);
  const ready = latest.models.filter((each) => each.state === "ready").length;
  byId("models-count").textContent = `${number(ready)} of ${number(latest.models.length)} ready` +
    (words ? `; ${number(found.length)} found` : "") + (some.length < found.length ? `; the first ${FEW} shown` : "");
  byId("models-more").hidden = some.length === found.length && !all;
  byId("models-more").textContent = all ? `Show ${FEW}` : "Show all";
  table("models", "Models and their versions",
    ["Model", "Version", "State", "Device", "Queue", "Calls/s", "Failures/s", "p50", "p99", "Problem"],
    some.map((each) => [
      each.model || each.bundle, each.version || "–", { text: each.state, style: STATES[each.state] }, each.device,
      right(number(each.queue_rows)), right(rate(each.rates.requests_per_s)), right(rate(each.rates.failures_per_s)),
      right(duration(each.rates.p50_s)), right(duration(each.rates.p99_s)), each.problem,
    ]));
}

function showOrchestrator(link) {
  if (!link.enrolled) {
    list("orchestrator", [["Enrolled", "no; this appliance stands alone"]]);
    return;
  }
  const created = Object.entries(link.created).map(([kind, count]) => `${count} × ${kind.replace("_", " ")}`);
  list("orchestrator", [
    ["Enrolled", `with ${link.api_base} as ${link.user_id}`],
    ["Link", link.connected === null ? "not known" : link.connected
      ? `up since ${moment(link.since)}, ${number(link.runners)} runners` : `down: ${link.problem || "it begins"}`],
    ["Created there", created.join(", ") || "nothing yet"],
  ]);
}

// ---- asking ----

async function poll() {
  if (asking) return;
  clearTimeout(timer);
  asking = true;
  let pause = POLL_MS;
  try {
    const headers = readerKey ? { authorization: `Bearer ${readerKey}` } : {};
    const reply = await fetch("/status.json", {
      headers, cache: "no-store", credentials: "same-origin", signal: AbortSignal.timeout(PATIENCE_MS),
    });
    if (reply.status === 401 || reply.status === 403) {
      await askForKey(reply);
      return;
    }
    if (!reply.ok) throw new Error(`it answers ${reply.status}`);
    const status = await reply.json();
    byId("reader").hidden = true;
    byId("main").hidden = false;
    show(status);
    if (lost) say("The appliance answers again.");
    lost = false;
    byId("trouble").hidden = true;
  } catch (error) {
    pause = AGAIN_MS;
    const known = latest ? ` What is shown is as of ${moment(latest.at)}.` : "";
    trouble(`The appliance does not answer (${error.message}); trying again.${known}`);
    lost = true;
  } finally {
    asking = false;
  }
  if (!document.hidden) timer = setTimeout(poll, pause);
}

function trouble(text) {
  const line = byId("trouble");
  if (line.textContent !== text) line.textContent = text;
  line.hidden = false;
}

async function askForKey(reply) {
  const { error } = await reply.json();
  byId("main").hidden = true;
  byId("trouble").hidden = !readerKey;
  if (readerKey) trouble(error);
  readerKey = "";
  byId("reader").hidden = false;
  byId("reader-key").focus();
}

// ---- trying a model ----

const usable = (each) => each.state === "ready" && each.input && each.model;
const chosen = () => latest.models.find((each) => usable(each) && each.model === byId("try-model").value);

function offer(status) {
  const names = [...new Set(status.models.filter(usable).map((each) => each.model))];
  byId("try").hidden = !names.length;
  byId("try-none").hidden = names.length > 0;
  const before = byId("try-model").value;
  fill("try-model", names, () => names.map((name) => element("option", { value: name }, name)));
  if (names.includes(before)) byId("try-model").value = before;
  showForm();
}

function showForm() {
  const model = chosen();
  if (!model) return;
  byId("try-image").hidden = model.input !== "image";
  byId("try-text").hidden = model.input !== "text";
  byId("try-preview").hidden = model.input !== "image" || !byId("try-preview").src;
  byId("try-code").textContent = snippet(model);
}

// A text between quotes as Python reads it.
const quoted = (text) => JSON.stringify(text).replace(/[\u007f-\u{10ffff}]/gu, (character) => {
  const code = character.codePointAt(0), hex = code.toString(16);
  return code > 0xffff ? `\\U${hex.padStart(8, "0")}` : `\\u${hex.padStart(4, "0")}`;
});

function snippet(model) {
  const file = byId("try-file").files[0];
  const call = model.input === "image"
    ? `model.predict_by_filepath(${quoted(file ? file.name : "picture.png")}, input_type="image")`
    : `model.predict_by_bytes(${quoted(byId("try-words").value || "a text")}.encode(), input_type="text")`;
  return [
    "# pip install clarifai; the key is read from the environment: export CLARIFAI_PAT=…",
    "from clarifai.client.model import Model",
    "",
    "model = Model(",
    `    url=${quoted(`https://clarifai.com/${model.model.replace(/\/([^/]*)$/, "/models/$1")}`)},`,
    `    base_url=${quoted(latest.base_url)},`,
    `    root_certificates_path=${quoted(latest.root_certificate)},  # elsewhere, a copy of it`,
    ")",
    `reply = ${call}`,
    "for concept in reply.outputs[0].data.concepts:",
    '    print(f"{concept.name} {concept.value:.3f}")',
  ].join("\n");
}

function asBase64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error("the file cannot be read"));
    reader.readAsDataURL(file);
  });
}

async function input(model) {
  if (model.input === "text") return { text: { raw: byId("try-words").value } };
  const file = byId("try-file").files[0];
  if (!file) throw new Error("choose a picture first");
  if (file.size > MOST_FILE) {
    throw new Error(`the picture has ${bytes(file.size)}; from this page it may have ${bytes(MOST_FILE)}`);
  }
  return { image: { base64: await asBase64(file) } };
}

async function attempt(event) {
  event.preventDefault();
  const model = chosen(), send = byId("try-send");
  if (!model || send.disabled) return;
  send.disabled = true;
  answer(element("p", {}, "Asking …"));
  try {
    const headers = { "content-type": "application/json" };
    if (byId("try-key").value) headers["x-appliance-key"] = byId("try-key").value.trim();
    if (readerKey) headers.authorization = `Bearer ${readerKey}`;
    const begun = performance.now();
    const reply = await fetch(`/try/${model.model.split("/").map(encodeURIComponent).join("/")}`, {
      method: "POST", headers, body: JSON.stringify({ inputs: [{ data: await input(model) }] }),
      cache: "no-store", credentials: "same-origin", signal: AbortSignal.timeout(TRY_PATIENCE_MS),
    });
    const content = await reply.json();
    showAnswer(reply, content, (performance.now() - begun) / 1000);
  } catch (error) {
    answer(element("p", { class: "bad" }, `✕ It did not work: ${error.message}.`));
  } finally {
    send.disabled = false;
  }
}

const answer = (...parts) => byId("try-answer").replaceChildren(...parts);

function showAnswer(reply, content, seconds) {
  const output = content.outputs?.[0];
  const said = output?.status && output.status.code !== 10000 ? output.status : content.status;
  if (content.error || !output || said?.code !== 10000) {
    const text = content.error ?? `${said?.code ?? reply.status} ${said?.description ?? ""}: ${said?.details ?? ""}`;
    answer(element("p", { class: "bad" }, `✕ ${text}`));
    return;
  }
  const data = output.data ?? {}, concepts = data.concepts ?? [];
  const version = output.model?.model_version?.id ?? "";
  const line = element("p", { class: "good" }, `● Answered in ${duration(seconds)}, by version ${version}.`);
  if (!concepts.length) {
    const text = JSON.stringify(data);
    answer(line, element("p", {}, text.length > 600 ? `${text.slice(0, 600)} …` : text));
    return;
  }
  const rows = concepts.map(({ name, value = 0 }) => element("tr", {},
    element("th", { scope: "row" }, name), element("td", { class: "number" }, number(value, 3)),
    element("td", {}, element("meter", { min: 0, max: 1, value, "aria-label": `value of ${name}` }))));
  const heads = ["Concept", "Value", ""].map((name, place) => (place < 2
    ? element("th", { scope: "col", ...(place ? { class: "number" } : {}) }, name) : element("td")));
  answer(line, element("table", {}, element("caption", { class: "hidden" }, "Concepts"),
    element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows)));
}

function preview() {
  const picture = byId("try-preview"), file = byId("try-file").files[0];
  if (picture.src) URL.revokeObjectURL(picture.src);
  if (file) {
    picture.src = URL.createObjectURL(file);
    picture.alt = `The picture ${file.name}`;
  } else {
    picture.removeAttribute("src");
  }
  showForm();
}

// ---- beginning ----

byId("try").addEventListener("submit", attempt);
byId("try-model").addEventListener("change", showForm);
byId("try-words").addEventListener("input", showForm);
byId("try-file").addEventListener("change", preview);
byId("filter").addEventListener("input", showModels);
byId("models-more").addEventListener("click", () => {
  all = !all;
  showModels();
});
byId("reader").addEventListener("submit", (event) => {
  event.preventDefault();
  readerKey = byId("reader-key").value.trim();
  byId("reader-key").value = "";
  poll();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) poll();
});
poll();
