"use strict";
// Theme: the system's, until the button is pressed.
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const name = () => { button.textContent = dark() ? "Light theme" : "Dark theme"; };
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("sdebench-theme", root.dataset.theme); } catch { /* not remembered */ }
    name();
  });
  system.addEventListener("change", name);
  name();
  button.hidden = false;
})();

// The table: sort, filter, and the state of both in the address.
(() => {
  const table = document.getElementById("cells");
  const tools = document.getElementById("tools");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const keys = heads.map((head) => head.dataset.key);
  const rows = [...body.rows].map((element) => ({
    element,
    text: element.textContent.toLowerCase(),
    short: element.classList.contains("short"),
  }));
  const nShort = rows.filter((row) => row.short).length;
  const hasBrief = nShort > 0 && nShort < rows.length;
  const first = 300; // rows that a browser lays out at once
  const collator = new Intl.Collator("en", { numeric: true });
  const entry = (row, column) => row.element.cells[column];
  // A reason stands behind the status: it is no choice of its own.
  const choice = (row, column) => entry(row, column).textContent.split(": ")[0];

  const state = { q: "", all: false, sort: "", down: false, limit: first, chosen: {} };

  // ---- the tools above the table
  const make = (tag, properties) => Object.assign(document.createElement(tag), properties);
  const label = (text, control) => {
    const out = make("label", {});
    out.append(make("span", { textContent: text }), control);
    return out;
  };
  const search = make("input", { type: "search", id: "search" });
  const all = make("input", { type: "checkbox", id: "all" });
  const status = make("p", { id: "count" });
  status.setAttribute("role", "status");
  const clear = make("button", { type: "button", id: "clear", textContent: "Clear" });
  const more = make("button", { type: "button", className: "more", id: "more" });
  const selects = new Map();
  heads.forEach((head, column) => {
    if ("choice" in head.dataset) {
      selects.set(column, make("select", { id: `choose-${keys[column]}` }));
    }
  });
  tools.append(label("search", search));
  for (const [column, select] of selects) tools.append(label(heads[column].textContent, select));
  if (hasBrief) {
    const check = make("label", { className: "check" });
    check.append(all, make("span", { textContent: `all ${rows.length} cells, every setting` }));
    tools.append(check);
  }
  tools.append(clear, status);
  table.parentElement.after(more);
  tools.hidden = false;

  // ---- which rows, in which order
  const inMode = () => (hasBrief && !state.all ? rows.filter((row) => row.short) : rows);
  const passes = (row, words, except) =>
    words.every((word) => row.text.includes(word)) &&
    [...selects.keys()].every((column) => {
      const wanted = state.chosen[keys[column]];
      return !wanted || column === except || choice(row, column) === wanted;
    });
  const number = (row, column) => {
    const value = entry(row, column).dataset.v;
    // Relative before absolute numbers before none, whatever the direction.
    return value ? [value.endsWith("a") ? 1 : 0, parseFloat(value)] : [2, 0];
  };
  const sorted = (found) => {
    const column = keys.indexOf(state.sort);
    if (column < 0) return found;
    const sign = state.down ? -1 : 1;
    if (!heads[column].classList.contains("number")) {
      const text = (row) => entry(row, column).textContent;
      return found.map((row) => [text(row), row])
        .sort((a, b) => sign * collator.compare(a[0], b[0])).map((pair) => pair[1]);
    }
    return found.map((row) => [number(row, column), row])
      .sort(([a], [b]) => a[0] - b[0] || sign * (a[1] - b[1])).map((pair) => pair[1]);
  };

  // ---- drawing
  const fill = (mode, words) => {
    for (const [column, select] of selects) {
      const wanted = state.chosen[keys[column]] || "";
      const every = new Set(mode.map((row) => choice(row, column)));
      const open = new Set(mode.filter((row) => passes(row, words, column)).map((row) => choice(row, column)));
      if (wanted) open.add(wanted);
      const names = [...open].sort(collator.compare);
      select.replaceChildren(make("option", { value: "", textContent: "all" }),
        ...names.map((name) => make("option", { value: name, textContent: name })));
      select.value = wanted;
      const offered = state.all || !hasBrief || heads[column].dataset.choice === "always";
      select.parentElement.style.display = wanted || (offered && every.size > 1) ? "" : "none";
    }
  };
  const draw = () => {
    const mode = inMode();
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    const found = sorted(mode.filter((row) => passes(row, words)));
    const shown = found.slice(0, state.limit);
    const problem = state.sort && state.sort !== "problem" ? -1 : keys.indexOf("problem");
    let last = null;
    for (const row of shown) {
      const name = problem < 0 ? "" : entry(row, problem).textContent;
      row.element.classList.toggle("first", name !== last && problem >= 0);
      last = name;
    }
    table.classList.toggle("brief", hasBrief && !state.all);
    table.classList.toggle("grouped", problem >= 0);
    body.replaceChildren(...shown.map((row) => row.element));
    heads.forEach((head, column) => {
      if (keys[column] === state.sort) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    fill(mode, words);
    const kind = hasBrief && !state.all ? "cells with default settings" : "cells";
    const part = shown.length < found.length ? `, the first ${shown.length} shown` : "";
    status.textContent = `${found.length} of ${mode.length} ${kind}${part}`;
    more.textContent = `Show all ${found.length} rows`;
    more.style.display = part ? "" : "none";
    clear.style.display = state.q || Object.values(state.chosen).some(Boolean) || state.sort ? "" : "none";
    search.value = state.q;
    all.checked = state.all;
  };

  // ---- the address
  const save = () => {
    const out = new URLSearchParams();
    if (state.q) out.set("q", state.q);
    for (const key of keys) if (state.chosen[key]) out.set(key, state.chosen[key]);
    if (state.sort) out.set("sort", (state.down ? "-" : "") + state.sort);
    if (state.all) out.set("all", "1");
    const text = out.toString();
    if (!text && !location.hash.includes("=")) return;
    try { history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search); } catch { /* not every place allows it */ }
  };
  const read = () => {
    if (!location.hash.includes("=")) return;
    const given = new URLSearchParams(location.hash.slice(1));
    state.q = given.get("q") || "";
    state.all = given.get("all") === "1";
    for (const column of selects.keys()) state.chosen[keys[column]] = given.get(keys[column]) || "";
    const sort = given.get("sort") || "";
    state.down = sort.startsWith("-");
    state.sort = keys.includes(sort.replace(/^-/, "")) ? sort.replace(/^-/, "") : "";
  };
  const change = () => { state.limit = first; save(); draw(); };

  // ---- what the reader does
  heads.forEach((head, column) => {
    const button = make("button", { type: "button" });
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const mine = state.sort === keys[column];
      if (mine && state.down) [state.sort, state.down] = ["", false];
      else [state.sort, state.down] = [keys[column], mine];
      change();
    });
  });
  let waiting = 0;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { state.q = search.value; change(); }, 100);
  });
  for (const [column, select] of selects) {
    select.addEventListener("change", () => { state.chosen[keys[column]] = select.value; change(); });
  }
  all.addEventListener("change", () => { state.all = all.checked; change(); });
  clear.addEventListener("click", () => {
    Object.assign(state, { q: "", sort: "", down: false, chosen: {} });
    change();
    search.focus();
  });
  more.addEventListener("click", () => { state.limit = Infinity; draw(); status.focus?.(); });
  addEventListener("hashchange", () => { read(); draw(); });
  read();
  draw();
})();
