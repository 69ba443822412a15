"use strict";
// element() alone makes elements of texts, so no text becomes markup. An episode's JSON is parsed when it is opened.

const byId = (id) => document.getElementById(id);
addEventListener("error", (event) => { byId("count").textContent = "This page is broken: " + event.message; });

const read = (id) => JSON.parse(byId(id).textContent);
const index = read("index").map((row, id) => ({ ...row, id }));
const LEVELS = [0.1, 0.5, 2, 5]; // nats
const AT_ONCE = 200; // rows of the list
const LONG = 400; // characters of a text that is folded
const SIGNS = { won: "\u2713", lost: "\u2717", failed: "!" };

const COLUMNS = [
  { name: "\u2713\u2717", key: "ending", class: "", show: (row) => ending(row, SIGNS[kind(row)]) },
  { name: "step", key: "n", class: "number" },
  { name: "set", key: "dataset", class: "" },
  { name: "arm", key: "arm", class: "wide" },
  { name: "k", key: "k", class: "number wide" },
  { name: "turns", key: "turns", class: "number", falling: true },
  { name: "reward", key: "reward", class: "number wide", show: (row) => number(row.reward), falling: true },
  { name: "KL", key: "kl", class: "number", show: (row) => number(row.kl, 1), falling: true },
  { name: "task", key: "goal", class: "task", show: (row) => [
    element("div", { class: "goal" }, row.goal), element("div", { class: "metadata" }, row.task)] },
].filter(({ key }) => key === "goal" || new Set(index.map((row) => row[key])).size > 1);
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
let task = null; // whose rows alone are shown
let byNote = false; // whether tokens are coloured by what the teacher's note changed
let rendered = 0; // rows of `shown` that have elements

// ----------------------------------------------------------------------------------------------------------- elements

/** An element with attributes ("on..." are listeners), and children that are elements, texts or null. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null) made.setAttribute(name, value);
  }
  const present = children.flat(Infinity).filter((child) => child !== null);
  made.append(...present.map((child) => (child.nodeType ? child : visible(child))));
  return made;
}

function button(attributes, ...children) {
  return element("button", { type: "button", ...attributes }, ...children);
}

/** A text with characters that would command the page's layout, or show nothing, as their codes. */
function visible(text) {
  const hidden = /[\0-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\p{Cs}]/gu;
  const code = (character) => character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
  return String(text).replace(hidden, (character) => "\u27e8" + code(character) + "\u27e9");
}

/** A text; of a long one the first lines, and a button for the rest. */
function foldable(tag, attributes, text) {
  const box = element(tag, attributes, text);
  if (text.length < LONG) return box;
  box.classList.add("folded");
  const unfold = (event) => {
    box.classList.remove("folded");
    event.target.remove();
  };
  return element("div", {}, box, button({ class: "more", onclick: unfold }, "all of it"));
}

function number(value, digits = 2) {
  if (value == null) return "";
  const text = value.toFixed(digits);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "\u2212");
}

function signed(value) {
  return (value >= 0.005 ? "+" : "") + number(value);
}

function counted(count, what) {
  return count + " " + what + (count === 1 ? "" : "s");
}

/** "won", "lost" or "failed". */
function kind(row) {
  return row.ending.split(":")[0];
}

function ending(row, text = SIGNS[kind(row)] + " " + row.ending) {
  return element("span", { class: "ending " + kind(row), title: row.ending }, text);
}

// --------------------------------------------------------------------------------------------------------------- list

function makeFilters() {
  const form = byId("filters");
  for (const filter of FILTERS) {
    const counts = new Map();
    for (const value of index.flatMap(filter.values)) counts.set(value, (counts.get(value) || 0) + 1);
    const values = [...counts.keys()].sort(compare);
    filter.select = element("select", { name: filter.name, onchange: update }, element("option", { value: "" }, "all"),
      values.map((value) => element("option", { value }, value + " (" + counts.get(value) + ")")));
    if (values.length > 1) form.append(element("label", {}, filter.name, filter.select));
  }
  const search = element("input", { type: "search", id: "search", oninput: update });
  form.append(element("label", {}, "search in tasks", search));
  form.addEventListener("submit", (event) => event.preventDefault());
}

function makeHead() {
  const sortBy = ({ key, falling = false }) => {
    sorting = { key, down: sorting?.key === key ? !sorting.down : falling };
    update();
  };
  const head = (column) => element("th", { class: column.class, scope: "col", "data-key": column.key },
    button({ onclick: () => sortBy(column) }, column.name));
  byId("head").append(...COLUMNS.map(head));
}

function compare(a, b) {
  if (a === b) return 0;
  if (a === null || b === null) return a === null ? 1 : -1;
  return a < b ? -1 : 1;
}

/** Filter and sort again; rows without a value come last. */
function update() {
  const wanted = FILTERS.filter((filter) => filter.select.value !== "");
  const words = byId("search").value.toLowerCase();
  shown = index.filter((row) => (row.goal + "\n" + row.task).toLowerCase().includes(words)
    && wanted.every((filter) => filter.values(row).map(String).includes(filter.select.value))
    && (task === null || row.task === task));
  if (sorting) {
    const { key, down } = sorting;
    const order = (a, b) => (down && a !== null && b !== null ? compare(b, a) : compare(a, b));
    shown.sort((a, b) => order(a[key], b[key]) || a.id - b.id);
  }
  for (const head of byId("head").children) {
    const direction = sorting?.key !== head.dataset.key ? "none" : sorting.down ? "descending" : "ascending";
    head.setAttribute("aria-sort", direction);
  }
  const counts = Object.keys(SIGNS).map((name) => shown.filter((row) => kind(row) === name).length + " " + name);
  byId("count").textContent = shown.length + " of " + index.length + " episodes: " + counts.join(", ");
  byId("rows").replaceChildren();
  byId("table").scrollTop = rendered = 0;
  renderRows(AT_ONCE);
}

function renderRows(more) {
  const cell = (row, { class: look, key, show }) => element("td", { class: look }, show ? show(row) : row[key]);
  const rows = shown.slice(rendered, rendered + more).map((row) =>
    element("tr", { "data-id": row.id, "aria-selected": row === current, onclick: () => open(row) },
      COLUMNS.map((column) => cell(row, column))));
  byId("rows").append(...rows);
  rendered += rows.length;
}

/** Select a row of the list, with elements for it where it has none yet. */
function select(row) {
  byId("rows").querySelector("[aria-selected='true']")?.setAttribute("aria-selected", "false");
  const place = shown.indexOf(row);
  if (place >= rendered) renderRows(place + AT_ONCE - rendered);
  const line = byId("rows").querySelector("[data-id='" + row.id + "']");
  line?.setAttribute("aria-selected", "true");
  line?.scrollIntoView({ block: "nearest" });
}

// ------------------------------------------------------------------------------------------------------------ episode

function open(row) {
  current = row;
  select(row);
  const episode = read("e" + row.id);
  byId("episode").replaceChildren(toolbar(row), heading(row, episode), chart(episode), conversation(episode),
    wholeText(episode));
  document.body.classList.add("reading");
  byId("episode").scrollTop = 0;
  history.replaceState(null, "", "#" + row.id);
}

function toolbar(row) {
  const same = counted(index.filter((other) => other.task === row.task).length, "episode") + " of this task";
  const toggle = (id, on, onclick, text) => button({ id, "aria-pressed": on, onclick }, text);
  return element("div", { class: "bar" }, button({ id: "back", onclick: back }, "\u2190 list"),
    button({ onclick: () => step(-1) }, "previous"), button({ onclick: () => step(1) }, "next"),
    toggle("same", task !== null, toggleTask, same),
    toggle("numbers", document.body.classList.contains("numbers"), toggleNumbers, "numbers"));
}

function heading(row, episode) {
  const facts = [row.run, episode.arm, episode.dataset === "train" ? "training" : "evaluation on " + episode.dataset,
    "step " + episode.n, fact("depth k =", episode.k), episode.replayed ? counted(episode.replayed, "turn") + " replayed" : null,
    row.turns + " of at most " + counted(episode.budget, "turn") + " played", fact("reward", number(episode.reward)),
    fact("KL", number(episode.kl)), episode.task_type, episode.source, fact("not scored:", episode.unscored)];
  return element("div", {}, foldable("h2", {}, episode.goal), foldable("p", { class: "metadata text" }, episode.task),
    element("p", { class: "facts" }, ending(row), facts.filter((one) => one).map((one) => " \u00b7 " + one)),
    foldable("p", { class: "text" }, episode.detail ?? ""), teacherNote(episode));
}

/** What the teacher alone was shown, folded, and a button where the episode was scored without it, too. */
function teacherNote({ note, turns }) {
  if (!note?.tokens) return null;
  const toggle = () => { byNote = !byNote; open(current); };
  const cut = note.left_out ? ", " + counted(note.left_out, "part") + " left out" : "";
  const effect = turns.some((turn) => turn.plain)
    ? button({ "aria-pressed": byNote, onclick: toggle }, "colour tokens by its effect") : null;
  return element("details", { id: "note", open: byNote ? "" : null },
    element("summary", {}, "The teacher's note, " + counted(note.tokens, "token") + cut), effect,
    element("pre", {}, note.text.join("\n")));
}

function fact(name, value) {
  return value == null || value === "" ? null : name + " " + value;
}

function chart(episode) {
  const top = Math.max(0.1, ...episode.turns.map((turn) => Math.abs(turn.kl ?? 0)));
  if (episode.turns.every((turn) => turn.kl == null)) {
    return element("p", { class: "facts" }, "No KL: the teacher did not score this episode.");
  }
  const column = (turn) => {
    const without = turn.role === "replayed" ? "replayed" : "unscored";
    const type = turn.kl == null ? without : turn.kl < 0 ? "below" : "above";
    const bar = element("i");
    if (turn.kl != null) bar.style.height = (80 * Math.abs(turn.kl)) / top + "px";
    const title = "turn " + (turn.turn + 1) + ": " + (turn.kl == null ? without : number(turn.kl) + " nats");
    return button({ class: type, title, onclick: () => jump(turn.turn) }, number(turn.kl, 1), bar, turn.turn + 1);
  };
  return element("section", {}, element("h3", {}, "KL by turn, nats"),
    element("div", { class: "chart" }, episode.turns.map(column)));
}

function jump(turn) {
  document.querySelector(".turn.marked")?.classList.remove("marked");
  byId("turn-" + turn).classList.add("marked");
  byId("turn-" + turn).scrollIntoView({ block: "start" });
}

function conversation(episode) {
  const last = episode.outcome ? [element("div", { class: "label" }, "the environment's last answer"),
    observation(episode.outcome)] : null;
  return element("section", {}, element("h3", {}, "Conversation"), episode.turns.map(oneTurn),
    element("div", { class: "end" }, last, element("p", { class: "text" }, whyItEnded(episode))));
}

function oneTurn(turn) {
  const who = turn.role === "replayed" ? "replayed from the demonstration, not trained"
    : "student" + (turn.response_tokens ? ", " + counted(turn.response_tokens, "token") : "");
  const notes = [turn.valid === false ? "no valid format" : null,
    turn.admissible === false ? "not an admissible action" : null,
    turn.refused ? "refused by the environment" : null, turn.cut ? "\u2702 cut by the length limit" : null];
  return element("div", { class: "turn " + turn.role, id: "turn-" + turn.turn }, observation(turn.observation),
    element("div", { class: "label" }, "turn " + (turn.turn + 1) + ", " + who,
      turn.kl == null ? null : ", KL " + number(turn.kl) + " nats"),
    element("div", { class: "text response" }, turn.tokens ? tokens(turn) : turn.response ?? ""),
    element("div", { class: "text action" }, turn.action,
      notes.map((note) => note && element("span", { class: "note" }, note))));
}

function observation(text) {
  return foldable("div", { class: "text observation" }, text);
}

/** The look of a token by its KL: l4 .. l1, none, h1 .. h4. */
function level(kl) {
  const size = LEVELS.filter((bound) => Math.abs(kl) >= bound).length;
  return size ? (kl > 0 ? "h" : "l") + size : "";
}

/** A span for each token, with its KL and with what is shown while the pointer is on it. */
function tokens(turn) {
  const line = (name, value) => value === null ? "no score of the " + name
    : name + " " + number(value, 3) + " nats, probability " + Math.exp(value).toPrecision(3);
  return turn.tokens.map((text, i) => {
    const student = turn.student[i], teacher = turn.teacher ? turn.teacher[i] : null;
    const kl = student === null || teacher === null ? null : student - teacher;
    const tip = [visible(JSON.stringify(text)), line("student", student), line("teacher", teacher)];
    if (kl !== null) tip.push("KL " + signed(kl) + " nats");
    const effect = teacher === null || turn.plain?.[i] == null ? null : teacher - turn.plain[i];
    if (effect !== null) tip.push("the note makes it " + signed(effect) + " nats likelier");
    const shown = byNote && turn.plain ? effect : kl;
    const numbers = { "data-kl": shown === null ? null : signed(shown), "data-tip": tip.join("\n") };
    return element("span", { class: "token " + level(shown), ...numbers }, text);
  });
}

function whyItEnded(episode) {
  if (episode.failure) return "Failed: " + episode.failure;
  if (episode.won) return "Won.";
  if (episode.context_limited) return "\u2702 The context had no room for a further turn.";
  const played = episode.turns.filter((turn) => turn.role === "student");
  if (played.length >= episode.budget) return "\u2702 Out of turns: at most " + episode.budget + ".";
  if (played.at(-1)?.cut) return "\u2702 The last response was cut by the length limit.";
  return "The environment ended the episode.";
}

/** The tokens' text as the model saw it, made when it is asked for. */
function wholeText(episode) {
  const kept = episode.turns.filter((turn) => turn.response_tokens);
  if (!kept.length) return element("p", { class: "facts" }, "It failed before it was complete: no tokens were kept.");
  const part = (name, count, text) => [element("div", { class: "label" }, name + ", " + counted(count, "token")),
    element("pre", {}, text)];
  const box = element("details", {}, element("summary", {}, "The whole text, as the model saw it"));
  box.addEventListener("toggle", () => box.append(...kept.flatMap((turn) => [
    ...part("context", turn.context_tokens, turn.context.join(turn.observation)),
    ...part(turn.role, turn.response_tokens, turn.tokens ? turn.tokens.join("") : turn.response)])), { once: true });
  return box;
}

// ------------------------------------------------------------------------------------------------------ numbers, keys

function toggleNumbers() {
  const on = document.body.classList.toggle("numbers");
  byId("numbers")?.setAttribute("aria-pressed", on);
}

/** Show the episodes of the open row's task alone, or all again. */
function toggleTask() {
  task = task === null ? current.task : null;
  byId("same").setAttribute("aria-pressed", task !== null);
  update();
}

function step(by) {
  const next = shown[shown.includes(current) ? shown.indexOf(current) + by : 0];
  if (next) open(next);
}

function back() {
  document.body.classList.remove("reading");
  if (current) select(current);
}

const KEYS = {
  j: () => step(1), ArrowRight: () => step(1), k: () => step(-1), ArrowLeft: () => step(-1),
  t: () => current && toggleTask(), "#": toggleNumbers, Escape: back, "/": () => { back(); byId("search").focus(); },
};

function onKey(event) {
  const typing = event.target.closest?.("input, select");
  if (typing && event.key === "Escape") typing.blur();
  if (typing || event.ctrlKey || event.altKey || event.metaKey || !(event.key in KEYS)) return;
  event.preventDefault();
  KEYS[event.key]();
}

function start() {
  makeFilters();
  makeHead();
  update();
  new IntersectionObserver(([end]) => end.isIntersecting && renderRows(AT_ONCE)).observe(byId("end"));
  document.addEventListener("keydown", onKey);
  const asked = index[Number(location.hash.slice(1) || NaN)];
  if (asked) open(asked);
  else if (shown.length && matchMedia("(min-width: 50rem)").matches) open(shown[0]);
}

start();
