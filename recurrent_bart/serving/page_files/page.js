"use strict";

const at = (id) => document.getElementById(id);
const TOKEN = "recurrent-bart-token", THEME = "recurrent-bart-theme";

// positions of the service count code points, strings of this language count UTF-16 units
const length = (text) => [...text].length;
const part = (text, start, end) => [...text].slice(start, end).join("");

const empty = () => ({ id: null, sent: 0, nSections: 0, pending: null, blocks: [], cards: [], isNewSection: true, lost: 0 });
let session = empty();
let stopper = null;

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

// ---- requests

class Refusal extends Error {}

function sentence(detail) {
  const text = typeof detail === "string" && detail ? detail : "the service refused the request";
  return text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

async function call(method, path, body, type = "text/plain; charset=utf-8") {
  for (;;) {
    const headers = body === undefined ? {} : { "Content-Type": type };
    const token = sessionStorage.getItem(TOKEN);
    if (token) headers.Authorization = `Bearer ${token}`;
    let answer;
    try {
      answer = await fetch(path, { method, headers, body, signal: stopper?.signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refusal("The service does not answer. Check that it is running, then try again.");
    }
    if (answer.ok) return answer;
    if (answer.status === 401) {
      await askToken(Boolean(token));
      continue;
    }
    const content = await answer.json().catch(() => ({}));
    throw new Refusal(sentence(content.detail));
  }
}

function askToken(wasWrong) {
  const form = at("token-form");
  form.hidden = false;
  if (wasWrong) show("The token is wrong.");
  at("token").value = "";
  at("token").focus();
  return new Promise((resolve) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(TOKEN, at("token").value);
      form.hidden = true;
      show("");
      resolve();
    };
  });
}

// calls `onText` for each piece of a summary, and returns the content of the last event
async function stream(method, path, onText) {
  const answer = await call(method, path);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refusal("The service ended the summary too early. Try again.");
    const blocks = (waiting + value).split("\n\n");
    waiting = blocks.pop();
    for (const block of blocks) {
      const [name, data] = block.split("\n").map((line) => line.slice(line.indexOf(": ") + 2));
      const content = JSON.parse(data);
      if (name === "text") onText(content.text);
      if (name === "error") throw new Refusal(sentence(content.detail));
      if (name === "end") return content;
    }
  }
}

// ---- work, one thing at a time

function show(text) {
  at("error").textContent = text;
  at("error").hidden = !text;
}

async function work(status, action) {
  if (stopper) return;
  stopper = new AbortController();
  show("");
  at("status").textContent = status;
  refresh();
  try {
    await action();
    at("status").textContent = "";
  } catch (error) {
    at("status").textContent = "";
    if (error.name === "AbortError") at("status").textContent = "Stopped.";
    else if (error instanceof Refusal) show(error.message);
    else {
      show("The page has a fault.");
      console.error(error);
    }
  } finally {
    stopper = null;
    refresh();
  }
}

function refresh() {
  const isBusy = stopper !== null;
  for (const id of ["summarise", "add", "new", "load", "choose"]) at(id).disabled = isBusy;
  at("save").disabled = isBusy || session.id === null;
  at("end").disabled = isBusy || (session.isNewSection && !at("text").value.trim());
  at("stop").hidden = !isBusy;
  at("empty").hidden = session.blocks.length > 0 || session.lost > 0;
  at("summaries-title").hidden = session.cards.length === 0;
  at("pointing").hidden = !session.cards.some((card) => card.citations);
}

async function open() {
  if (session.id === null) session.id = (await (await call("POST", "v1/sessions")).json()).id;
}

async function send(text) {
  await open();
  const path = `v1/sessions/${session.id}/text?position=${session.sent}`;
  session.pending = text;
  keep(text, (await (await call("POST", path, text)).json()).n_characters);
}

function keep(text, sent) {
  session.pending = null;
  session.sent = sent;
  addSource(text);
  session.isNewSection = session.isNewSection && !text.trim();
}

// An answer may be lost after the service has done its work, so the service tells what it has.
async function settle() {
  if (session.pending === null) return;
  const has = await (await call("GET", `v1/sessions/${session.id}`)).json();
  const text = session.pending, box = pieceOf(at("text").value);
  session.pending = null;
  if (text && has.n_characters > session.sent) {
    if (box.startsWith(text)) at("text").value = box.slice(text.length);
    keep(text, has.n_characters);
  }
  // the number of the section gives its summary again
  if (has.n_sections > session.nSections) await endSection();
}

// the last line of a piece is whole: the next piece begins a new line
const pieceOf = (text) => (text.endsWith("\n") ? text : `${text}\n`);

// the box keeps what the service has not got, so that nothing is lost or sent twice after an error
async function sendSections(text) {
  const mark = at("mark").value.trim(), lines = pieceOf(text).match(/[^\n]*\n/g);
  let first = 0;
  const sendUntil = async (end) => {
    const piece = lines.slice(first, end).join("");
    if (piece.trim()) await send(piece);
    first = end;
    at("text").value = lines.slice(end).join("");
  };
  for (const [number, line] of lines.entries()) {
    if (!mark || line.trim() !== mark) continue;
    await sendUntil(number);
    if (!session.isNewSection) await endSection();
    first = number + 1;
    at("text").value = lines.slice(first).join("");
  }
  await sendUntil(lines.length);
}

async function takeText() {
  await settle();
  const text = at("text").value;
  if (!text.trim()) return;
  await sendSections(text);
}

async function summarise() {
  await takeText();
  if (session.isNewSection) {
    if (!session.cards.length) throw new Refusal("There is no text yet. Paste a document first.");
    return;
  }
  await write(openCard(), "GET", `v1/sessions/${session.id}/summary?stream=true&citations=true`);
}

async function endSection() {
  const card = openCard(), number = session.nSections + 1;
  session.pending = "";
  await write(card, "POST", `v1/sessions/${session.id}/sections?number=${number}&stream=true&citations=true`);
  Object.assign(session, { pending: null, nSections: number });
  card.isEnded = true;
  titles();
  session.isNewSection = true;
  addBreak();
}

// ---- summaries

function openCard() {
  const last = session.cards.at(-1);
  return last && !last.isEnded ? last : addCard({ text: "", citations: null, isEnded: false });
}

function addCard(content) {
  const card = { ...content, number: session.cards.length + 1, element: make("li") };
  card.heading = make("h3");
  card.body = make("p", "text");
  card.cited = make("div", "cited");
  card.cited.hidden = true;
  card.element.append(card.heading, card.body, card.cited);
  session.cards.push(card);
  titles();
  at("summaries").append(card.element);
  fill(card);
  return card;
}

function titles() {
  const isAlone = session.cards.length === 1 && !session.cards[0].isEnded;
  for (const card of session.cards) {
    card.heading.textContent = `${isAlone ? "Whole text" : `Section ${card.number}`}${card.isEnded ? "" : ", so far"}`;
  }
}

async function write(card, method, path) {
  at("status").textContent = "Writing the summary.";
  clear();
  Object.assign(card, { text: "", citations: null });
  fill(card);
  card.body.setAttribute("aria-busy", "true");
  try {
    const found = await stream(method, path, (text) => card.body.append(text));
    Object.assign(card, { text: found.summary, citations: found.citations ?? null });
    fill(card);
  } finally {
    card.body.removeAttribute("aria-busy");
  }
}

function fill(card) {
  card.cited.hidden = true;
  card.body.replaceChildren();
  let end = 0;
  for (const citation of card.citations ?? []) {
    card.body.append(part(card.text, end, citation.start));
    const span = make("span", "sentence", part(card.text, citation.start, citation.end));
    span.tabIndex = 0;
    span.setAttribute("role", "button");
    const point = () => pointAt(card, citation, span);
    span.addEventListener("mouseenter", point);
    span.addEventListener("focus", point);
    span.addEventListener("click", point);
    card.body.append(span);
    end = citation.end;
  }
  card.body.append(part(card.text, end));
}

function pointAt(card, citation, span) {
  if (stopper) return;
  clear();
  span.classList.add("pointed");
  const heaviest = citation.passages[0]?.weight ?? 1;
  const marks = citation.passages.map((passage) => markPassage(passage, passage.weight / heaviest));
  const list = make("ul");
  citation.passages.forEach((passage, number) => {
    const item = make("li");
    const text = marks[number].map((mark) => mark.textContent).join(" ").trim();
    const shown = text.length > 200 ? `${text.slice(0, 200)}…` : text;
    item.append(make("b", "", `${Math.round(100 * passage.weight)} %`));
    item.append(make("span", "", shown || `characters ${passage.start} to ${passage.end} of text that is not on this page`));
    list.append(item);
  });
  card.cited.replaceChildren(make("p", "", citation.passages.length ? "Read from:" : "No passage stands out."), list);
  if (citation.state_share > 0.005) {
    card.cited.append(make("p", "quiet", `${Math.round(100 * citation.state_share)} % of the attention is on the state, which holds all that was read.`));
  }
  card.cited.hidden = false;
  const first = marks[0]?.[0];
  if (first) scrollTo(first);
}

// moves the source alone, so that the summary stays where it is
function scrollTo(element) {
  const pane = at("source"), box = element.getBoundingClientRect(), frame = pane.getBoundingClientRect();
  if (box.top < frame.top || box.bottom > frame.bottom) pane.scrollTop += box.top - frame.top - frame.height / 3;
}

// ---- source

function addSource(text) {
  for (const line of text.match(/[^\n]*\n|[^\n]+/g) ?? []) {
    const before = session.blocks.at(-1);
    const block = { start: before ? before.end : session.lost, text: line, element: make("p", "", line.trimEnd()) };
    block.end = block.start + length(line);
    session.blocks.push(block);
    at("source").append(block.element);
  }
}

function addBreak() {
  const rule = make("hr", "break");
  rule.setAttribute("aria-label", "End of a section");
  session.blocks.at(-1).isBreak = true;
  at("source").append(rule);
}

function markPassage(passage, strength) {
  const marks = [];
  for (const block of session.blocks) {
    const start = Math.max(passage.start, block.start), end = Math.min(passage.end, block.end);
    if (start >= end) continue;
    block.marked ??= [];
    block.marked.push({ start: start - block.start, end: end - block.start, strength, marks });
  }
  for (const block of session.blocks) if (block.marked?.some((it) => it.marks === marks)) draw(block);
  return marks;
}

// passages never overlap, so each mark stands alone
function draw(block) {
  const nodes = [], letters = [...block.text];
  let end = 0;
  for (const range of block.marked.sort((one, other) => one.start - other.start)) {
    nodes.push(letters.slice(end, range.start).join(""));
    const mark = range.mark ?? make("mark", "", letters.slice(range.start, range.end).join(""));
    mark.style.setProperty("--strength", range.strength);
    if (!range.mark) range.marks.push(mark);
    range.mark = mark;
    nodes.push(mark);
    end = Math.max(end, range.end);
  }
  block.element.replaceChildren(...nodes, letters.slice(end).join("").trimEnd());
}

function clear() {
  for (const pointed of document.querySelectorAll(".sentence.pointed")) pointed.classList.remove("pointed");
  for (const block of session.blocks) {
    if (block.marked) block.element.replaceChildren(block.text.trimEnd());
    block.marked = null;
  }
  for (const card of session.cards) card.cited.hidden = true;
}

// ---- saved sessions: the service's file, with this page's texts among its notes

function header(bytes) {
  const size = Number(new DataView(bytes.buffer).getBigUint64(0, true));
  return { size, content: JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + size))) };
}

async function save() {
  await settle();
  const bytes = new Uint8Array(await (await call("GET", `v1/sessions/${session.id}/state`)).arrayBuffer());
  const { size, content } = header(bytes);
  const cards = session.cards.map(({ text, citations, isEnded }) => ({ text, citations, isEnded }));
  const blocks = session.blocks.map(({ text, isBreak }) => ({ text, isBreak }));
  content.__metadata__.page = JSON.stringify({ cards, blocks, lost: session.lost, isNewSection: session.isNewSection });
  let head = new TextEncoder().encode(JSON.stringify(content));
  const padded = new Uint8Array(Math.ceil(head.length / 8) * 8).fill(32);
  padded.set(head);
  const first = new Uint8Array(8);
  new DataView(first.buffer).setBigUint64(0, BigInt(padded.length), true);
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([first, padded, bytes.subarray(8 + size)]));
  link.download = "session.safetensors";
  link.click();
  URL.revokeObjectURL(link.href);
}

async function load(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  let kept = null;
  try {
    kept = JSON.parse(header(bytes).content.__metadata__.page ?? "null");
  } catch {
    throw new Refusal("The file is not a saved session.");
  }
  const { id } = await (await call("POST", "v1/sessions")).json();
  let has;
  try {
    has = await (await call("PUT", `v1/sessions/${id}/state`, bytes, "application/octet-stream")).json();
  } catch (error) {
    await call("DELETE", `v1/sessions/${id}`).catch(() => null);
    throw error;
  }
  await forget();
  // citations count the characters as they were read
  Object.assign(session, { id, sent: has.n_characters, nSections: has.n_sections, lost: kept ? kept.lost : has.n_read });
  session.isNewSection = kept ? kept.isNewSection : false;
  if (session.lost) at("source").append(make("p", "quiet", `${session.lost} characters were read before; their text is not in the file.`));
  for (const block of kept?.blocks ?? []) {
    addSource(block.text);
    if (block.isBreak) addBreak();
  }
  for (const card of kept?.cards ?? []) addCard(card);
  at("text").focus();
}

async function forget() {
  const { id } = session;
  session = empty();
  at("summaries").replaceChildren();
  at("source").replaceChildren(at("empty"));
  if (id !== null) await call("DELETE", `v1/sessions/${id}`).catch(() => null);
}

// ---- controls

async function readFile(file) {
  const bytes = await file.arrayBuffer();
  try {
    at("text").value = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new Refusal("The file is not a UTF-8 text.");
  }
  await summarise();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  at("theme").textContent = theme === "dark" ? "Light" : "Dark";
}

function connect() {
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  setTheme(sessionStorage.getItem(THEME) ?? (isDark ? "dark" : "light"));
  at("theme").addEventListener("click", () => {
    setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    sessionStorage.setItem(THEME, document.documentElement.dataset.theme);
  });
  at("input").addEventListener("submit", (event) => {
    event.preventDefault();
    work("Reading the text.", summarise);
  });
  at("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("input").requestSubmit();
  });
  at("text").addEventListener("input", refresh);
  at("add").addEventListener("click", () => work("Reading the text.", takeText));
  at("end").addEventListener("click", () => work("Reading the text.", async () => {
    await takeText();
    if (!session.isNewSection) await endSection();
  }));
  at("stop").addEventListener("click", () => stopper?.abort());
  at("new").addEventListener("click", () => work("", async () => {
    await forget();
    at("text").value = "";
    at("text").focus();
  }));
  at("save").addEventListener("click", () => work("", save));
  for (const [button, input, status, action] of [["choose", "file", "Reading the text.", readFile], ["load", "state", "Loading the session.", load]]) {
    at(button).addEventListener("click", () => at(input).click());
    at(input).addEventListener("change", () => {
      const [file] = at(input).files;
      at(input).value = "";
      if (file) work(status, () => action(file));
    });
  }
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      at("input").classList.toggle("dragged", name === "dragover");
      const file = event.dataTransfer?.files[0];
      if (name !== "drop") return;
      if (file) work("Reading the text.", () => (file.name.endsWith(".safetensors") ? load(file) : readFile(file)));
      else at("text").value += event.dataTransfer?.getData("text/plain") ?? "";
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") clear();
  });
  refresh();
}

connect();
