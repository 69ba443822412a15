"use strict";
// Elements are made of texts by element() alone, so no text becomes markup. An episode's JSON is parsed when it is opened.

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const byId = (id) => document.getElementById(id);
const index = read("index").map((row, id) => ({ ...row, id }));
const LEVELS = [0.1, 0.5, 2, 5]; // nats
const AT_ONCE = 200; // rows of the list
const LONG = 400; // characters of an observation
const SIGNS = { won: "\u2713", lost: "\u2717", failed: "!" };

const COLUMNS = [
  { name: "", key: "ending", show: (row) => SIGNS[kind(row)], class: "ending" },
  { name: "step", key: "n", class: "number" },
  { name: "set", key: "dataset", class: "" },
  { name: "arm", key: "arm", class: "wide" },
  { name: "k", key: "k", class: "number wide" },
  { name: "turns", key: "turns", class: "number" },
  { name: "KL", key: "kl", class: "number", show: (row) => number(row.kl, 1) },
  { name: "task", key: "goal", class: "goal" },
];
const FILTERS = [
  { name: "run", values: (row) => [row.run] },
  { name: "arm", values: (row) => [row.arm] },
  { name: "set", values: (row) => [row.dataset] },
  { name: "outcome", values: (row) => (row.ending.startsWith("failed") ? ["failed", row.ending] : [row.ending]) },
  { name: "k", values: (row) => (row.k === null ? [] : [row.k]) },
  { name: "task type", values: (row) => [row.task_type] },
];

let sorting = null; // {key, down}
let shown = []; // rows that pass the filters, in order
let current = null; // the open row
let rendered = 0; // rows of `shown` that have elements

// ------------------------------------------------------------------------------------------------------------- elements

/** An element with attributes ("on..." are listeners), and children that are elements or texts. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null).map((child) => (child.nodeType ? child : visible(child))));
  return made;
}

/** A text with characters that would command the page's layout, or show nothing, as their codes. */
function visible(text) {
  return String(text).replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\p{Cs}]/gu,
    (character) => "\u27e8" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "\u27e9");
}

function number(value, digits = 2) {
  if (value === null) return "";
  const text = value.toFixed(digits).replace("-", "\u2212");
  return Number(value.toFixed(digits)) === 0 ? text.replace("\u2212", "") : text;
}

function counted(count, what) {
  return count + " " + what + (count === 1 ? "" : "s");
}

function signed(value) {
  return (value >= 0.005 ? "+" : "") + number(value);
}

function kind(row) {
  return row.ending.split(":")[0];
}

function ending(row) {
  return element("span", { class: "ending " + kind(row) }, SIGNS[kind(row)] + " " + row.ending);
}

// ----------------------------------------------------------------------------------------------------------------- list

function makeFilters() {
  const form = byId("filters");
  for (const filter of FILTERS) {
    const counts = new Map();
    for (const row of index) for (const value of filter.values(row)) counts.set(value, (counts.get(value) || 0) + 1);
    const values = [...counts.keys()].sort(compare);
    filter.select = element("select", { name: filter.name, onchange: update }, element("option", { value: "" }, "all"),
      values.map((value) => element("option", { value: String(value) }, value + " (" + counts.get(value) + ")")));
    if (values.length > 1) form.append(element("label", {}, filter.name, filter.select));
  }
  form.append(element("label", {}, "search in tasks", element("input", { type: "search", id: "search", oninput: update })));
  form.addEventListener("submit", (event) => event.preventDefault());
}

function makeHead() {
  const sortBy = (key) => {
    sorting = { key, down: sorting?.key === key ? !sorting.down : key === "kl" || key === "turns" };
    update();
  };
  byId("rows").querySelector("thead").append(element("tr", {}, COLUMNS.map((column) =>
    element("th", { class: column.class, scope: "col", "data-key": column.key },
      element("button", { type: "button", title: "sort by " + (column.name || "outcome"), onclick: () => sortBy(column.key) },
        column.name || "\u2713\u2717")))));
}

function compare(a, b) {
  if (a === b) return 0;
  if (a === null || b === null) return a === null ? 1 : -1;
  return a < b ? -1 : 1;
}

/** Filter and sort again; rows without a value come last. */
function update() {
  const wanted = FILTERS.map((filter) => [filter, filter.select.value]).filter(([, value]) => value !== "");
  const words = byId("search").value.toLowerCase();
  shown = index.filter((row) => wanted.every(([filter, value]) => filter.values(row).some((one) => String(one) === value))
    && row.goal.toLowerCase().includes(words));
  if (sorting) {
    const { key, down } = sorting;
    const order = (a, b) => (a === null || b === null || !down ? compare(a, b) : compare(b, a));
    shown.sort((a, b) => order(a[key], b[key]) || a.id - b.id);
  }
  for (const head of document.querySelectorAll("#rows th")) {
    const active = sorting?.key === head.dataset.key;
    head.setAttribute("aria-sort", active ? (sorting.down ? "descending" : "ascending") : "none");
    const button = head.firstChild;
    button.textContent = button.textContent.replace(/ [\u25b2\u25bc]$/, "") + (active ? (sorting.down ? " \u25bc" : " \u25b2") : "");
  }
  const counts = ["won", "lost", "failed"].map((name) => shown.filter((row) => kind(row) === name).length + " " + name);
  byId("count").textContent = shown.length + " of " + index.length + " episodes: " + counts.join(", ");
  byId("rows").querySelector("tbody").replaceChildren();
  rendered = 0;
  renderRows(AT_ONCE);
}

function renderRows(more) {
  const rows = shown.slice(rendered, rendered + more).map((row) =>
    element("tr", { "data-id": row.id, "aria-selected": String(row === current), onclick: () => open(row) },
      COLUMNS.map((column) => element("td", { class: column.class + (column.key === "ending" ? " " + kind(row) : ""),
        title: column.key === "ending" ? row.ending : null }, column.show ? column.show(row) : row[column.key] ?? ""))));
  byId("rows").querySelector("tbody").append(...rows);
  rendered += rows.length;
}

/** Select a row of the list, with elements for it where it has none yet. */
function select(row) {
  document.querySelector("#rows [aria-selected='true']")?.setAttribute("aria-selected", "false");
  const place = shown.indexOf(row);
  if (place >= rendered) renderRows(place + AT_ONCE - rendered);
  const line = document.querySelector("#rows [data-id='" + row.id + "']");
  line?.setAttribute("aria-selected", "true");
  line?.scrollIntoView({ block: "nearest" });
}

// -------------------------------------------------------------------------------------------------------------- episode

function open(row) {
  current = row;
  select(row);
  const episode = read("e" + row.id);
  const article = byId("episode");
  article.replaceChildren(toolbar(), heading(row, episode), sameTask(row), chart(episode), conversation(episode), wholeText(episode));
  document.body.classList.add("reading");
  article.scrollTop = 0;
  history.replaceState(null, "", "#" + row.id);
}

function toolbar() {
  const toggle = element("button", { type: "button", id: "numbers", "aria-pressed": String(document.body.classList.contains("numbers")),
    onclick: toggleNumbers }, "numbers");
  return element("div", { class: "bar" }, element("button", { type: "button", id: "back", onclick: back }, "\u2190 list"),
    element("button", { type: "button", onclick: () => step(-1) }, "previous"),
    element("button", { type: "button", onclick: () => step(1) }, "next"), toggle);
}

function heading(row, episode) {
  const students = episode.turns.filter((turn) => turn.role === "student").length;
  const facts = [row.run, episode.arm, episode.dataset === "train" ? "training" : "evaluation on " + episode.dataset,
    "step " + episode.n, episode.k === null ? null : "depth k = " + episode.k,
    episode.replayed ? counted(episode.replayed, "turn") + " replayed" : null, students + " of at most " + counted(episode.budget, "turn") + " played",
    episode.kl === null ? null : "KL " + number(episode.kl) + " nats", episode.task_type || null];
  const detail = episode.failure && episode.detail ? element("p", { class: "text" }, episode.detail) : null;
  const unscored = episode.unscored ? element("p", {}, "without the teacher's scores: " + episode.unscored) : null;
  return element("div", {}, element("h2", {}, episode.goal), element("p", { class: "facts" }, ending(row), " \u00b7 ",
    facts.filter((fact) => fact !== null).join(" \u00b7 ")), detail, unscored);
}

/** Rows of the open row's task, in the order of steps. */
function siblings(row) {
  return index.filter((other) => other.task === row.task).sort((a, b) => compare(a.run, b.run) || a.n - b.n || a.id - b.id);
}

function sameTask(row) {
  const others = siblings(row);
  if (others.length < 2) return element("p", { class: "facts" }, "No other episode of this task was saved.");
  const item = (other) => element("li", {}, element("button", { type: "button", "data-to": other.id,
    "aria-current": other === row ? "true" : null, onclick: () => open(other) },
  [other.run, other.dataset, "step " + other.n, other.k === null ? null : "k " + other.k,
    SIGNS[kind(other)] + " " + other.ending, counted(other.turns, "turn"), other.kl === null ? null : "KL " + number(other.kl, 1)]
    .filter((part) => part !== null).join(" \u00b7 ")));
  return element("section", {}, element("h3", {}, "The same task at other steps"), element("ul", { class: "same" }, others.map(item)));
}

function chart(episode) {
  const scored = episode.turns.filter((turn) => turn.role === "student" && turn.kl !== null);
  if (!scored.length) return element("p", { class: "facts" }, "No KL: the teacher did not score this episode.");
  const top = Math.max(...scored.map((turn) => Math.abs(turn.kl)), 0.1);
  const column = (turn) => {
    const type = turn.role === "replayed" ? "replayed" : turn.kl === null ? "unscored" : turn.kl < 0 ? "below" : "above";
    const value = turn.role === "replayed" ? "replayed" : turn.kl === null ? "no KL" : number(turn.kl) + " nats";
    const bar = element("i");
    if (turn.kl !== null && turn.kl !== undefined) bar.style.height = (80 * Math.abs(turn.kl)) / top + "px";
    return element("button", { type: "button", class: type, title: "turn " + (turn.turn + 1) + ": " + value, onclick: () => jump(turn.turn) },
      type === "replayed" ? "" : number(turn.kl ?? null, 1), bar, String(turn.turn + 1));
  };
  return element("section", {}, element("h3", {}, "KL by turn, nats"), element("div", { class: "chart" }, episode.turns.map(column)));
}

function jump(turn) {
  document.querySelector(".turn.marked")?.classList.remove("marked");
  const target = byId("turn-" + turn);
  target.classList.add("marked");
  target.scrollIntoView({ block: "start" });
}

function conversation(episode) {
  const spans = new Map(episode.spans.filter((span) => span.role === "sampled").map((span) => [span.turn, span]));
  return element("section", {}, element("h3", {}, "Conversation"),
    episode.turns.map((turn) => oneTurn(turn, spans.get(turn.turn))), theEnd(episode));
}

function oneTurn(turn, span) {
  const replayed = turn.role === "replayed";
  const kl = turn.kl === null || turn.kl === undefined ? "" : ", KL " + number(turn.kl) + " nats";
  const who = replayed ? "turn " + (turn.turn + 1) + ", replayed from the demonstration, not trained"
    : "turn " + (turn.turn + 1) + ", student" + (span ? ", " + counted(span.count, "token") : "") + kl;
  const notes = replayed ? [] : [turn.valid ? null : "no valid format", turn.admissible ? null : "not an admissible action",
    turn.cut ? "\u2702 cut by the length limit" : null].filter((note) => note !== null);
  return element("div", { class: "turn " + turn.role, id: "turn-" + turn.turn },
    observation(turn.observation), element("div", { class: "label" }, who),
    element("div", { class: "text response" }, span?.tokens ? tokens(span) : turn.response),
    element("div", { class: "text action" }, turn.action, notes.map((note) => element("span", { class: "note" }, note))));
}

/** What the environment said; of a long text four lines, and a button for the rest. */
function observation(text) {
  const box = element("div", { class: "text observation" }, text);
  if (text.length < LONG) return box;
  box.classList.add("folded");
  const unfold = (event) => {
    box.classList.remove("folded");
    event.target.remove();
  };
  return element("div", {}, box, element("button", { type: "button", class: "more", onclick: unfold }, "all of it"));
}

function level(kl) {
  const size = LEVELS.filter((bound) => Math.abs(kl) >= bound).length;
  return size ? (kl > 0 ? "h" : "l") + size : "";
}

function tokens(span) {
  return span.tokens.map((text, i) => {
    const student = span.student[i], teacher = span.teacher ? span.teacher[i] : null;
    const kl = student === null || teacher === null ? null : student - teacher;
    return element("span", { class: "token " + (kl === null ? "" : level(kl)), "data-student": student, "data-teacher": teacher,
      "data-kl": kl === null ? null : signed(kl) }, text);
  });
}

function whyItEnded(episode) {
  if (episode.failure) return "Failed: " + episode.failure;
  if (episode.won) return "Won.";
  if (episode.context_limited) return "\u2702 The context had no room for a further turn.";
  const played = episode.turns.filter((turn) => turn.role === "student");
  if (played.length >= episode.budget) return "\u2702 Out of turns: at most " + episode.budget + ".";
  return played.at(-1)?.cut ? "\u2702 The last response was cut by the length limit." : "The environment ended the episode.";
}

function theEnd(episode) {
  const said = episode.outcome ? [element("div", { class: "label" }, "the environment's last answer"),
    observation(episode.outcome)] : [];
  return element("div", { class: "end" }, said, element("p", { class: "text" }, whyItEnded(episode)));
}

/** The sequence as the model saw it, made when it is asked for. */
function wholeText(episode) {
  if (!episode.spans.length) return element("p", { class: "facts" }, "It failed before it was complete, so no tokens were kept.");
  const box = element("details", {}, element("summary", {}, "The whole sequence, as the model saw it"));
  box.addEventListener("toggle", () => {
    if (!box.open || box.childElementCount > 1) return;
    for (const span of episode.spans) {
      if (!span.count) continue;
      box.append(element("div", { class: "label" }, span.role + ", " + span.count + " tokens"),
        element("pre", { class: "whole" }, span.text ?? span.tokens.join("")));
    }
  });
  return box;
}

// -------------------------------------------------------------------------------------------------------- numbers, keys

function toggleNumbers() {
  const on = document.body.classList.toggle("numbers");
  byId("numbers")?.setAttribute("aria-pressed", String(on));
}

function showTip(event) {
  const token = event.target.closest?.(".token[data-student]");
  const tip = byId("tip");
  tip.hidden = !token;
  if (!token) return;
  const line = (name, value) => name + " " + number(value, 3) + " nats, probability " + Math.exp(value).toPrecision(3);
  const { student, teacher, kl } = token.dataset;
  tip.textContent = [visible(JSON.stringify(token.textContent)), line("student", Number(student)),
    teacher === undefined ? "no teacher's score" : line("teacher", Number(teacher)), kl === undefined ? "" : "KL " + kl + " nats"].join("\n");
  const place = token.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(place.left, innerWidth - tip.offsetWidth - 4)) + "px";
  tip.style.top = (place.bottom + tip.offsetHeight + 6 > innerHeight ? place.top - tip.offsetHeight - 6 : place.bottom + 6) + "px";
}

function step(by) {
  const at = shown.indexOf(current);
  const next = shown[at < 0 ? 0 : at + by];
  if (next) open(next);
}

function stepInTask(by) {
  const others = current ? siblings(current) : [];
  const next = others[others.indexOf(current) + by];
  if (next) open(next);
}

function back() {
  document.body.classList.remove("reading");
  if (current) select(current);
}

const KEYS = {
  j: () => step(1), ArrowRight: () => step(1), k: () => step(-1), ArrowLeft: () => step(-1),
  "]": () => stepInTask(1), "[": () => stepInTask(-1), "#": toggleNumbers, Escape: back,
  "/": () => { back(); byId("search").focus(); },
};

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.target.closest?.("input, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const action = KEYS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

function makeAbout() {
  for (const { name, about } of read("runs")) {
    const facts = [["command", about.command], ["started", about.started], ["recipe", about.recipe?.commit], ["slime", about.slime?.commit],
      ["versions", Object.entries(about.versions ?? {}).map(([what, version]) => what + " " + (version ?? "-")).join(", ")],
      ["settings", Object.entries(about.settings ?? {}).map(([what, value]) => what + ": " + value).join(", ")]];
    byId("about").append(element("h3", {}, name), Object.keys(about).length === 0 ? element("p", {}, "It has no about.json.")
      : element("dl", {}, facts.map(([what, value]) => [element("dt", {}, what), element("dd", {}, value || "not known")])));
  }
  byId("legend").append(...["l4", "l3", "l2", "l1", "", "h1", "h2", "h3", "h4"].flatMap((look) => {
    const bound = look ? (look[0] === "h" ? "above " : "below \u2212") + LEVELS[look[1] - 1] : "about 0";
    return [element("span", { class: "token " + look }, bound), " "];
  }));
}

function start() {
  makeAbout();
  makeFilters();
  makeHead();
  update();
  const rows = byId("rows");
  const extend = (box) => { if (box.scrollTop + box.clientHeight > box.scrollHeight - 600) renderRows(AT_ONCE); };
  rows.addEventListener("scroll", () => extend(rows));
  addEventListener("scroll", () => extend(document.documentElement));
  document.addEventListener("pointerover", showTip);
  document.addEventListener("pointerdown", showTip);
  document.addEventListener("keydown", onKey);
  const asked = index[Number(location.hash.slice(1) || NaN)];
  if (asked) open(asked);
  else if (shown.length && matchMedia("(min-width: 50rem)").matches) open(shown[0]);
}

start();
