// The live view: frames and figures come over a WebSocket; each frame is acknowledged once it is on the screen.

import { Curve, percent } from "./curve.js";
import { Trial } from "./service.js";

const byId = (id) => document.getElementById(id);
const screen = byId("screen");
const curve = new Curve(byId("curve"));
const trial = new Trial(screen, showAlert, showArea);
const decoder = new TextDecoder();

let socket = null;
let retryAfter = 500; // milliseconds
let modalities = [];
let sources = 0;
let state = { status: "connecting", paused: false, modality: null, threshold: 0.5, opacity: 0.35 };
let held = 0; // until when (milliseconds) a slider that is being moved is left alone
let alertUntil = 0;

const STATUS = {
  connecting: "Connecting",
  waiting: "Waiting for frames",
  running: "Live",
  paused: "Paused",
  ended: "Ended",
  service: "Service",
  lost: "Connection lost",
};

// ---------------------------------------------------------------- connection

function connect() {
  const address = new URL("live", document.baseURI); // relative, as all here: a gateway may serve this below a path
  address.protocol = address.protocol.replace("http", "ws");
  socket = new WebSocket(address);
  socket.binaryType = "arraybuffer";
  let opened = false;
  socket.onopen = () => {
    opened = true;
    retryAfter = 500;
  };
  socket.onmessage = ({ data }) => (typeof data === "string" ? onText(JSON.parse(data)) : onFrame(data));
  socket.onclose = async ({ code }) => {
    showStatus("lost");
    if (code === 4429) {
      showMessage("There are enough viewers already. Trying again every ten seconds.");
      retryAfter = 10000;
    } else {
      showMessage("No connection to the program. Trying again.");
      if (!opened && (await signedOut())) {
        location.replace("login");
        return;
      }
    }
    setTimeout(connect, retryAfter);
    retryAfter = Math.min(5000, 1.6 * retryAfter);
  };
}

async function signedOut() {
  try {
    return (await fetch("metrics", { method: "HEAD" })).status === 401;
  } catch {
    return false;
  }
}

function send(message) {
  if (socket && socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}

function onText(message) {
  if (message.type === "hello") onHello(message);
  else if (message.type === "state") onState(message);
  else if (message.type === "curve") {
    if (message.restart) curve.clear();
    curve.add(message.points);
  } else if (message.type === "error") showAlert(`${message.message} ${message.hint}`);
}

async function onFrame(buffer) {
  const length = new DataView(buffer).getUint32(0);
  const header = JSON.parse(decoder.decode(new Uint8Array(buffer, 4, length)));
  const picture = await createImageBitmap(new Blob([new Uint8Array(buffer, 4 + length)], { type: "image/jpeg" }));
  requestAnimationFrame(() => {
    if (screen.width !== picture.width || screen.height !== picture.height) {
      screen.width = picture.width;
      screen.height = picture.height;
    }
    screen.getContext("2d").drawImage(picture, 0, 0);
    picture.close();
    byId("picture").classList.add("has-picture");
    showArea(header.fraction, header.area, state.square_millimetres, header.confidence);
    screen.dataset.frame = header.frame;
    screen.dataset.number = header.number;
    const wide = Math.ceil(byId("picture").clientWidth * Math.min(2, window.devicePixelRatio || 1));
    send({ type: "ack", frame: header.number, width: Math.min(16384, Math.max(1, wide)) });
  });
}

// ------------------------------------------------------------------- showing

function onHello(message) {
  modalities = message.modalities;
  byId("untrained").hidden = !message.untrained;
  byId("modalities").replaceChildren(
    ...modalities.map(({ name, target, color }, i) => choice("modality", name, name, target, i + 1, color)),
  );
  if (message.service && !state.modality) state.modality = modalities[0].name;
  byId("try").hidden = !message.service;
  byId("pause").hidden = message.service;
  byId("logout").hidden = !message.token;
  curve.clear();
}

function choice(group, value, name, note, number, color) {
  const label = document.createElement("label");
  if (color) label.style.setProperty("--own", color);
  const input = Object.assign(document.createElement("input"), { type: "radio", name: group, value });
  const parts = [["swatch", ""], ["name", name], ["target", note]].map(([kind, text]) =>
    Object.assign(document.createElement("span"), { className: kind, textContent: text }),
  );
  if (!color) parts.shift();
  if (number && number < 10) parts.push(Object.assign(document.createElement("kbd"), { textContent: number }));
  label.append(input, ...parts);
  return label;
}

function onState(message) {
  const before = state;
  if (message.status === "service" && before.status === "service") {
    const { modality, threshold, opacity } = before; // this page's own, see change()
    message = { ...message, modality, threshold, opacity };
  }
  state = { ...state, ...message, modality: message.modality || state.modality };
  showStatus(state.status);
  const modality = modalities.find(({ name }) => name === state.modality);
  if (modality) {
    curve.color = modality.color;
    byId("what").textContent = `${modality.name}: ${modality.target}`;
  }
  for (const input of document.getElementsByName("modality")) {
    if (document.activeElement !== input || state.loading === null) input.checked = input.value === state.modality;
    input.parentElement.querySelector(".name").classList.toggle("busy", input.value === state.loading);
  }
  if (message.sources !== sources) {
    sources = message.sources;
    byId("sources-box").hidden = sources < 2;
    byId("sources").replaceChildren(
      ...Array.from({ length: sources }, (_, i) => choice("source", String(i), `Source ${i + 1}`, "", 0, "")),
    );
  }
  for (const input of document.getElementsByName("source")) input.checked = Number(input.value) === state.source;
  byId("pause").setAttribute("aria-pressed", String(state.paused));
  byId("pause").disabled = state.status === "ended";
  byId("pause-text").textContent = state.paused ? "Go on" : "Pause";
  if (Date.now() > held) {
    byId("threshold").value = state.threshold;
    byId("opacity").value = state.opacity;
    showSliders();
  }
  const number = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));
  byId("fps").textContent = state.frames ? number(state.fps, 1) : "–";
  byId("latency-of").textContent = state.latency_of === "capture" ? "Capture to mask" : "Frame to mask";
  for (const p of ["p50", "p90", "p99"]) byId(p).textContent = number(state.latency && state.latency[p], state.latency && state.latency[p] < 100 ? 1 : 0);
  byId("frames").textContent = state.frames.toLocaleString("en");
  byId("skipped").textContent = state.skipped.toLocaleString("en");
  byId("link").textContent = state.frames
    ? `${state.precision} on ${state.backend}. ${state.level ? `Slow connection or browser: picture reduced (step ${state.level} of 6).` : "Picture at full quality."}`
    : "";
  showMessage(
    { waiting: "Waiting for the first frame", ended: "The source has ended. This is its last frame.", service: "No source: this server segments the images that are sent to it." }[state.status] ||
      "",
  );
  if (before.status !== state.status || before.modality !== state.modality) describe();
  if (alertUntil && Date.now() > alertUntil) showAlert("");
}

function showStatus(status) {
  if (byId("status").dataset.status === status && byId("status-text").textContent === STATUS[status]) return;
  byId("status").dataset.status = status;
  byId("status-text").textContent = STATUS[status];
}

function describe() {
  screen.setAttribute("aria-label", `${STATUS[state.status]}: the picture with its mask, ${byId("what").textContent}`);
}

function showMessage(text) {
  byId("message-text").textContent = text;
  byId("message").hidden = !text;
}

function showAlert(text) {
  byId("alert").textContent = text;
  byId("alert").hidden = !text;
  alertUntil = text ? Date.now() + 8000 : 0;
}

function showArea(fraction, pixels, squareMillimetres, confidence) {
  byId("area").textContent = percent(fraction);
  const inMillimetres = squareMillimetres === null || squareMillimetres === undefined ? "" :
    squareMillimetres < 0.1 ? `, ${(1e6 * squareMillimetres).toFixed(0)} µm²` : `, ${squareMillimetres.toFixed(1)} mm²`;
  const sure = confidence === null || confidence === undefined ? "" : `, confidence ${confidence.toFixed(2)}`;
  byId("area-pixels").textContent = `${pixels.toLocaleString("en")} px${inMillimetres}${sure}`;
}

function showSliders() {
  byId("threshold-value").textContent = Number(byId("threshold").value).toFixed(2);
  byId("opacity-value").textContent = `${Math.round(100 * byId("opacity").value)} %`;
}

// ------------------------------------------------------------------ changing

// In service mode there is no run to change: the settings are this page's own and go along with each image.
function change(wish) {
  if (state.status !== "service") {
    send({ type: "set", ...wish });
    return;
  }
  state = { ...state, ...wish };
  onState(state);
  const color = modalities.find(({ name }) => name === state.modality).color;
  if ("opacity" in wish) trial.draw(color, state.opacity);
  else trial.ask({ ...state, color });
}

let pending = null;
function changeSoon(wish) {
  held = Date.now() + 1200;
  showSliders();
  if (pending) Object.assign(pending, wish);
  else {
    pending = wish;
    setTimeout(() => {
      change(pending);
      pending = null;
    }, 60);
  }
}

function togglePause() {
  if (!byId("pause").disabled && !byId("pause").hidden) change({ paused: !state.paused });
}

function nudge(id, step) {
  const slider = byId(id);
  slider.value = Number(slider.value) + step;
  changeSoon({ [id]: Number(slider.value) });
}

async function tryImage(file) {
  if (!file || state.status !== "service") return;
  const color = modalities.find(({ name }) => name === state.modality).color;
  if (await trial.take(file, { ...state, color })) {
    byId("picture").classList.add("has-picture");
    screen.setAttribute("aria-label", "Your image with its mask");
  }
}

function fullScreen() {
  if (document.fullscreenElement) document.exitFullscreen();
  else byId("picture").requestFullscreen().catch(() => showAlert("This browser does not allow full screen."));
}

byId("pause").addEventListener("click", togglePause);
byId("panel").addEventListener("submit", (event) => event.preventDefault());
byId("modalities").addEventListener("change", ({ target }) => change({ modality: target.value }));
byId("sources").addEventListener("change", ({ target }) => change({ source: Number(target.value) }));
for (const id of ["threshold", "opacity"]) byId(id).addEventListener("input", ({ target }) => changeSoon({ [id]: Number(target.value) }));
byId("fullscreen").addEventListener("click", fullScreen);
byId("help").addEventListener("click", () => byId("keys").showModal());
byId("logout").addEventListener("click", async () => {
  await fetch("logout", { method: "POST" });
  location.replace("login");
});
byId("file").addEventListener("change", ({ target }) => tryImage(target.files[0]));
for (const kind of ["dragover", "dragleave", "drop"])
  byId("picture").addEventListener(kind, (event) => {
    event.preventDefault();
    byId("picture").classList.toggle("dragging", kind === "dragover" && state.status === "service");
    if (kind === "drop") tryImage(event.dataTransfer.files[0]);
  });

const keys = {
  " ": togglePause,
  "[": () => nudge("threshold", -0.05),
  "]": () => nudge("threshold", 0.05),
  ",": () => nudge("opacity", -0.05),
  ".": () => nudge("opacity", 0.05),
  f: fullScreen,
  "?": () => byId("keys").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing || byId("keys").open) return;
  if (!byId("keys-on").checked) return;
  if (event.key === " " && event.target.closest("button, input, label, a, summary")) return; // theirs
  const number = Number(event.key);
  const act = number >= 1 && number <= modalities.length ? () => change({ modality: modalities[number - 1].name }) : keys[event.key.toLowerCase()];
  if (!act) return;
  event.preventDefault();
  act();
});

showSliders();
connect();
