// What htmx does not do: files that are dropped, losses as they come, answers as they come.
"use strict";

const token = document.body.dataset.csrf;
const byId = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function note(where, text) {
  where.replaceChildren(element("p", text, "quiet-text"));
}

// A file: its content is the body, and its name a header.
function setUpDrop(form) {
  const input = byId("file"), shown = byId("checked");
  let chosen = null;

  async function send(url, file) {
    const headers = { "X-CSRF-Token": token, "X-File-Name": encodeURIComponent(file.name), "HX-Request": "true" };
    return fetch(url, { method: "POST", headers, body: file });
  }

  async function check(file) {
    chosen = file;
    shown.setAttribute("aria-busy", "true");
    note(shown, form.dataset.reading);
    try {
      const reply = await send(form.dataset.check, file);
      if (chosen !== file) return;
      shown.innerHTML = await reply.text();  // made by our own templates, which escape what the file says
    } catch {
      note(shown, form.dataset.failed);
    }
    shown.removeAttribute("aria-busy");
    byId("upload")?.addEventListener("click", upload);
  }

  async function upload(event) {
    event.target.disabled = true;
    const was = event.target.textContent;
    event.target.textContent = form.dataset.sending;
    try {
      const reply = await send(form.dataset.upload, chosen);
      const next = reply.headers.get("hx-redirect");
      if (next && next.startsWith("/")) location.assign(next);
      else shown.insertAdjacentHTML("beforeend", await reply.text());
    } catch {
      shown.append(element("p", form.dataset.failed, "verdict bad"));
    }
    event.target.disabled = false;
    event.target.textContent = was;
  }

  input.addEventListener("change", () => input.files[0] && check(input.files[0]));
  for (const kind of ["dragenter", "dragover"])
    form.addEventListener(kind, (event) => { event.preventDefault(); form.classList.add("over"); });
  for (const kind of ["dragleave", "drop"]) form.addEventListener(kind, () => form.classList.remove("over"));
  form.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files[0]) check(event.dataTransfer.files[0]);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
}

// A job: server-sent events, a curve, a table with the same numbers.
function setUpJob(live) {
  const trained = new Map(), measured = new Map(), host = byId("chart");
  let plot = null, total = 0;
  const field = (name) => live.querySelector(`[data-field="${name}"]`);
  const show = (name, value) => { const it = field(name); if (it && value) it.textContent = value; };

  function draw() {
    const steps = [...new Set([...trained.keys(), ...measured.keys()])].sort((a, b) => a - b);
    if (!steps.length || !window.uPlot) return;
    byId("no-losses").hidden = true;
    const data = [steps, steps.map((it) => trained.get(it) ?? null), steps.map((it) => measured.get(it) ?? null)];
    const width = host.clientWidth;
    plot?.destroy();
    const axis = { stroke: colour("--quiet"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui" };
    const series = [
      { label: live.dataset.step },
      { label: live.dataset.train, stroke: colour("--accent"), width: 2, spanGaps: true, points: { show: steps.length < 60, size: 5 } },
      { label: live.dataset.valid, stroke: colour("--s1"), width: 2, spanGaps: true, dash: [6, 4], points: { show: true, size: 6 }, show: measured.size > 0 },
    ];
    const whole = (self, values) => values.map((it) => (Number.isInteger(it) ? it : ""));
    plot = new uPlot({
      width, height: width < 500 ? 220 : 280, series, legend: { show: measured.size > 0, live: false },
      scales: { x: { time: false, range: (self, low, high) => [low, Math.max(high, total, low + 1)] } }, axes: [{ ...axis, values: whole, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000] }, { ...axis, size: 54 }], cursor: { y: false },
    }, data, host);
    byId("losses").replaceChildren(...steps.map((step) => {
      const row = element("tr"), number = (value) => (value === undefined ? "–" : value.toFixed(4));
      for (const text of [String(step), number(trained.get(step)), number(measured.get(step))])
        row.append(element("td", text, "number"));
      return row;
    }));
  }

  function happened(event) {
    if (event.step !== null && event.train_loss !== null) trained.set(event.step, event.train_loss);
    if (event.step !== null && event.valid_loss !== null) measured.set(event.step, event.valid_loss);
    if (event.train_loss !== null) { show("loss", event.train_loss.toFixed(4)); return; }
    const line = element("li", undefined, event.level), at = element("time", new Date(event.at * 1000).toISOString().slice(11, 19));
    line.append(at, element("span", event.message));
    byId("events").prepend(line);
  }

  const source = new EventSource(live.dataset.live);
  source.addEventListener("state", (message) => {
    const state = JSON.parse(message.data);
    const badge = live.querySelector(`template[data-status="${CSS.escape(state.status)}"]`);
    if (badge) field("status")?.replaceChildren(badge.content.cloneNode(true));
    total = state.steps || total;
    state.events.forEach(happened);
    const last = Math.max(0, ...trained.keys());
    show("steps", state.steps ? `${state.step} / ${state.steps}` : last ? String(last) : "");
    for (const name of ["speed", "left"]) show(name, state.stalled ? "–" : state[name]);  // nobody knows while it stands still
    for (const name of ["verified", "requests"]) show(name, state[name]);
    if (state.advantage) {
      live.querySelector("[data-masks]")?.removeAttribute("hidden");
      show("advantage", state.advantage);
      show("budget", state.budget);
    }
    if (state.events.length) draw();
    const problem = byId("live-problem"), told = problem.textContent;
    if (!state.stalled) problem.replaceChildren();
    else if (told !== state.stalled) {
      const box = element("p", state.stalled, "verdict stalled");
      if (!told) box.setAttribute("role", "status");
      problem.replaceChildren(box);
    }
  });
  source.addEventListener("problem", (message) => {
    source.close();
    const box = element("div", undefined, "problem refused");
    box.setAttribute("role", "alert");
    box.append(element("p", JSON.parse(message.data).message, "told"));
    byId("live-problem").replaceChildren(box);
    setTimeout(() => setUpJob(live), 5000);
  });
  source.addEventListener("over", () => {
    source.close();
    if (live.dataset.over === "no") location.reload();
  });
  source.addEventListener("error", () => {
    if (source.readyState === EventSource.CLOSED) return;
    byId("live-problem").replaceChildren(element("p", live.dataset.gone, "quiet-text"));
  });
  window.addEventListener("resize", () => requestAnimationFrame(draw));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

// Two models, the same questions. Each goes on with its own answers; a question that was not answered is not part of it.
function setUpCompare(form) {
  const sides = ["base", "tuned"].map((name) => ({ name, turns: [], shown: byId(`answers-${name}`) }));
  const chosen = () => byId("tuned").selectedOptions[0], chats = () => byId("mode").value === "chat";
  let running = null;

  function begin() {
    running?.abort();
    for (const side of sides) {
      side.turns = [];
      side.shown.replaceChildren();
    }
    byId("answers").hidden = byId("anew").hidden = true;
    byId("base").textContent = chosen().dataset.base;
    byId("system-field").hidden = !chats();
  }

  function turn(side, who, text, tag = "p") {
    const box = element("div", undefined, "turn"), said = element(tag, text);
    box.append(element("p", who, "turn-who"), said);
    side.shown.append(box);
    return said;
  }

  async function ask(side, prompt, signal) {
    const question = { role: "user", content: prompt }, system = byId("system").value.trim();
    const before = chats() ? [...(system ? [{ role: "system", content: system }] : []), ...side.turns] : [];
    const model = side.name === "base" ? chosen().dataset.base : chosen().value;
    const settings = { mode: byId("mode").value, tokens: Number(byId("tokens").value), temperature: Number(byId("temperature").value) };
    turn(side, chats() ? form.dataset.user : form.dataset.prompt, prompt);
    const output = turn(side, chats() ? form.dataset.assistant : form.dataset.completion, "", "output");
    const answer = document.createTextNode("");
    output.append(answer);
    output.setAttribute("aria-busy", "true");
    let ended = false, problem = "";
    try {
      const headers = { "X-CSRF-Token": token, "HX-Request": "true", "Content-Type": "application/json" };
      const body = JSON.stringify({ model, messages: [...before, question], ...settings });
      const reply = await fetch(form.dataset.answer, { method: "POST", headers, body, signal });
      if (!reply.ok) { output.innerHTML = await reply.text(); return; }  // our own template's
      const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        const lines = (rest + value).split("\n");
        rest = lines.pop();
        for (const line of lines.filter(Boolean).map((it) => JSON.parse(it))) {
          if (line.text) answer.data = (answer.data + line.text).trimStart();
          problem ||= line.problem ?? "";
          ended ||= Boolean(line.end);
        }
      }
      if (!ended) problem ||= form.dataset.stopped;
    } catch (error) {
      problem = error.name === "AbortError" ? form.dataset.stopped : form.dataset.failed;
    } finally {
      output.removeAttribute("aria-busy");
    }
    if (problem) output.append(element("span", problem, "verdict bad"));
    else if (answer.data) side.turns.push(question, { role: "assistant", content: answer.data });
    else output.append(element("span", form.dataset.nothing, "quiet-text"));
  }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) return;
    const prompt = byId("prompt").value, mine = running = new AbortController();
    byId("answers").hidden = byId("anew").hidden = byId("stop").hidden = false;
    byId("ask").disabled = true;
    if (chats()) byId("prompt").value = "";
    else for (const side of sides) side.shown.replaceChildren();
    await Promise.all(sides.map((side) => ask(side, prompt, mine.signal)));
    running = null;
    byId("ask").disabled = false;
    byId("stop").hidden = true;
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("anew").addEventListener("click", () => { begin(); byId("prompt").focus(); });
  byId("mode").addEventListener("change", begin);
  byId("tuned").addEventListener("change", () => { byId("mode").value = chosen().dataset.mode; begin(); });
}

// A part that has not changed is not announced again by screen readers.
document.body.addEventListener("htmx:beforeSwap", (event) => {
  const old = event.detail.target;
  if (old?.id === "standing" && old.classList.contains("refused") && event.detail.serverResponse.includes('class="standing refused"'))
    event.detail.shouldSwap = false;
});
document.body.addEventListener("htmx:responseError", (event) => {
  if (event.detail.xhr.status === 401) location.assign(`${document.body.dataset.base}/enter`);
});

for (const [id, setUp] of [["drop", setUpDrop], ["live", setUpJob], ["compare", setUpCompare]])
  if (byId(id)) setUp(byId(id));
