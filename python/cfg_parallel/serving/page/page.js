// The page of `cfg-parallel serve`: OpenAI's routes for pictures, read as server-sent events.
"use strict";

const HEALTH_MS = 3000;
const PARTIAL_IMAGES = 2;

const byId = (id) => document.getElementById(id);
const image = byId("image");

let pipeline = null; // what the model takes, from /v1/models; null until it is loaded
let health = { status: "unknown" };
let running = null; // the AbortController of the request

class ServerError extends Error {}

// The server.

async function send(path, options = {}) {
  const key = byId("key").value;
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401) byId("key-field").hidden = false;
  const body = await response.json().catch(() => null);
  const wait = response.headers.get("Retry-After");
  const message = body?.error?.message ?? `The server answered ${response.status}.`;
  throw new ServerError(response.status === 429 && wait ? `Busy, try again in ${wait} s.` : message);
}

async function lookAtHealth() {
  try {
    health = await (await fetch("health")).json(); // 503 has a body too
  } catch {
    health = { status: "unreachable" };
  }
  if (!serves()) pipeline = null;
  else if (pipeline === null && (byId("key-field").hidden || byId("key").value)) await readModel();
  showHealth();
  setTimeout(lookAtHealth, HEALTH_MS);
}

const serves = () => health.status === "ok" || health.status === "degraded";

async function readModel() {
  try {
    const { data } = await (await send("v1/models")).json();
    if (!data[0].pipeline) return;
    pipeline = data[0].pipeline;
    byId("model").textContent = `${data[0].id} · ${pipeline.pipeline}`;
    adapt();
    byId("error").textContent = "";
  } catch (error) {
    showFailure(error);
  }
}

// Pieces are joined once a line is whole: a picture is one line of megabytes, in hundreds of pieces.
async function* linesOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pieces = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = value.split("\n");
    while (parts.length > 1) {
      pieces.push(parts.shift());
      yield pieces.join("");
      pieces = [];
    }
    pieces.push(parts[0]);
  }
}

// The events; one of type "waiting" for a comment, by which the server keeps the connection.
async function* eventsOf(response) {
  for await (const line of linesOf(response.body)) {
    if (line === "data: [DONE]") return;
    if (line.startsWith(":")) yield { type: "waiting" };
    else if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
  }
  throw new ServerError("The connection ended before the picture was there.");
}

// What is shown.

function adapt() {
  const { scales } = pipeline;
  offer("original", "image", pipeline.takes_image);
  image.multiple = pipeline.several_images;
  image.required = pipeline.needs_image;
  offer("negative-field", "negative", pipeline.takes_negative_prompt);
  offer("scale-field", "scale", scales.length > 0);
  byId("scale").name = scales.includes("true_cfg_scale") ? "true_cfg_scale" : "guidance_scale";
  showButtons();
}

// What is disabled is not sent.
function offer(field, control, offered) {
  byId(field).hidden = !offered;
  byId(control).disabled = !offered;
}

const edits = () => Boolean(pipeline?.takes_image && (pipeline.needs_image || image.files.length));

function showButtons() {
  byId("go").textContent = health.status === "starting" ? "The model is loading" : edits() ? "Edit" : "Generate";
  byId("go").disabled = pipeline === null || running !== null;
  byId("stop").disabled = running === null;
}

function showHealth() {
  const { status, waiting, running: busy } = health;
  byId("health").textContent = waiting === undefined ? status : `${status} · ${busy} running, ${waiting} waiting`;
  byId("health").dataset.status = status;
  showButtons();
}

function showFailure(error) {
  if (error.name === "AbortError") showProgress("Stopped.");
  else if (error instanceof ServerError) byId("error").textContent = error.message;
  else byId("error").textContent = `The server cannot be reached (${error.message}).`;
}

// `at`: a step's event, {} while there is none, or nothing when nothing runs.
function showProgress(text, at = null) {
  const bar = byId("bar");
  byId("now").textContent = text;
  bar.hidden = at === null;
  if (at?.steps) [bar.max, bar.value] = [at.steps, at.step];
  else bar.removeAttribute("value");
}

function showOriginals() {
  const shown = byId("originals");
  for (const old of shown.children) URL.revokeObjectURL(old.src);
  const pictures = [...image.files].map((file) => {
    const picture = document.createElement("img");
    picture.src = URL.createObjectURL(file);
    picture.alt = `Original: ${file.name}`;
    return picture;
  });
  shown.replaceChildren(...pictures);
  byId("invite").hidden = pictures.length > 0;
  byId("remove").hidden = pictures.length === 0;
  showButtons();
}

function showPicture(base64, caption, partial) {
  const picture = byId("picture");
  URL.revokeObjectURL(picture.src);
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  picture.src = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
  picture.classList.toggle("partial", partial);
  picture.hidden = false;
  byId("empty").hidden = true;
  byId("caption").textContent = caption;
}

function clearResult() {
  byId("picture").hidden = byId("download").hidden = true;
  byId("empty").hidden = false;
  byId("caption").textContent = "Result";
  byId("facts").replaceChildren();
}

function showResult({ b64_json, seed, metrics }) {
  showPicture(b64_json, `Result, seed ${seed}`, false);
  byId("download").href = byId("picture").src;
  byId("download").download = `cfg-parallel-${seed}.png`;
  byId("download").hidden = false;
  const steps = `${seconds(metrics.denoising_seconds)} of it for ${metrics.steps} steps`;
  const facts = [["Time", `${seconds(metrics.seconds)}, ${steps}, on ${metrics.devices.join(" and ")}`]];
  if (metrics.queue_seconds >= 0.1) facts.push(["In the queue", seconds(metrics.queue_seconds)]);
  if (metrics.why) facts.push(["Guidance", metrics.why]);
  if (metrics.one_device) {
    const times = (metrics.one_device.seconds / metrics.seconds).toFixed(2);
    const more = `${times} times as fast on ${metrics.devices.length} devices`;
    facts.push(["One device", `${seconds(metrics.one_device.seconds)}; ${more}`]);
    facts.push(["Pictures", metrics.one_device.equal ? "equal, bit for bit" : "not equal"]);
  }
  byId("facts").replaceChildren(...facts.flatMap(([name, text]) => [element("dt", name), element("dd", text)]));
}

const seconds = (number) => `${number.toFixed(2)} s`;

function element(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

// A request.

function requestOf(data) {
  for (const [name, value] of [...data]) if (value === "" || value.size === 0) data.delete(name);
  data.append("stream", "true");
  // Not where times are compared: the run on one device has none, and they take time.
  if (pipeline.partial_images && !data.has("compare")) data.append("partial_images", PARTIAL_IMAGES);
  if (edits()) return ["v1/images/edits", { method: "POST", body: data }];
  const body = JSON.stringify(Object.fromEntries(data));
  return ["v1/images/generations", { method: "POST", body, headers: { "Content-Type": "application/json" } }];
}

async function make() {
  const [path, options] = requestOf(new FormData(byId("form")));
  let taken = false; // out of the queue
  let made = false;
  running = new AbortController();
  byId("error").textContent = "";
  clearResult();
  showProgress("sent to the server", {});
  showButtons();
  try {
    for await (const event of eventsOf(await send(path, { ...options, signal: running.signal }))) {
      const kind = event.type.split(".").at(-1);
      if (kind === "error") throw new ServerError(event.error.message);
      if (kind === "waiting" && !taken) {
        showProgress("waiting in the queue", {});
      } else if (kind === "progress") {
        taken = true;
        const text = event.step ? `step ${event.step} of ${event.steps}` : "waiting for the first step";
        showProgress(event.one_device ? `on one device, to compare: ${text}` : text, event);
      } else if (kind === "partial_image") {
        showPicture(event.b64_json, "On its way", true);
      } else if (kind === "completed") {
        made = true;
        showResult(event);
        showProgress("");
      }
    }
  } catch (error) {
    showProgress("");
    showFailure(error);
  } finally {
    if (!made) clearResult();
    running = null;
    showButtons();
  }
}

// What the user does.

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  make();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("key").addEventListener("change", readModel);
image.addEventListener("change", showOriginals);
byId("remove").addEventListener("click", () => {
  image.value = "";
  showOriginals();
});

// The control lies over the whole field, so that the browser itself takes what is dropped.
for (const name of ["dragenter", "dragleave", "drop"]) {
  byId("drop").addEventListener(name, () => byId("drop").classList.toggle("over", name === "dragenter"));
}

lookAtHealth();
