// Draws what report.py gathered into DATA. No library, nothing fetched: it has to open from disk.
"use strict";

const COLOURS = matchMedia("(prefers-color-scheme: dark)").matches
  ? ["#8ab4ff", "#ff9e57", "#4cc38a", "#d7a6f0", "#ff8a80", "#4dd0e1", "#c9a592", "#a9bcc6", "#f48fb1"]
  : ["#2457c5", "#d1580b", "#0a7a3d", "#8e44ad", "#b3261e", "#00838f", "#6d4c41", "#546e7a", "#c2185b"];
const $ = (id) => document.getElementById(id);
const names = DATA.models.map((model) => model.name);
const numbers = [...new Set(DATA.models.flatMap((model) => Object.keys(model.numbers)))];
const better = Object.fromEntries(
  DATA.models.flatMap((model) => Object.entries(model.numbers).map(([number, found]) => [number, found.better])));

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

const short = (value) => Number(value.toPrecision(value !== 0 && Math.abs(value) < 0.01 ? 2 : 4)).toString();
const interval = (e) => (e.low === null ? short(e.value) : `${short(e.value)} [${short(e.low)}, ${short(e.high)}]`);

// Failures come first ------------------------------------------------------------------------------------------------

/** [numbers, {image: reason}] of a kind, "failed" or "left_out": numbers of one metric that lack the same images. */
function lacking(model, kind) {
  const groups = new Map();
  for (const [number, found] of Object.entries(model.numbers)) {
    if (!Object.keys(found[kind]).length) continue;
    const id = JSON.stringify([found.metric, found[kind]]);
    if (!groups.has(id)) groups.set(id, [[], found[kind]]);
    groups.get(id)[0].push(number);
  }
  return [...groups.values()].map(([found, images]) => [found.join(", "), images]);
}

function drawFailures() {
  let any = false;
  for (const model of DATA.models) {
    const groups = [["images were not made", model.not_made]];
    for (const [found, failed] of lacking(model, "failed")) groups.push([`images have no ${found}`, failed]);
    for (const [what, failed] of groups) {
      const entries = Object.entries(failed);
      if (!entries.length) continue;
      any = true;
      const list = element("ul", {}, ...entries.map(([id, why]) => element("li", {}, `${id}: ${why}`)));
      const head = element("summary", {}, `${model.name}: ${entries.length} of ${model.asked} ${what}. No mean includes them.`);
      $("failures").append(element("details", { class: "alarm" }, head, list));
    }
    for (const [found, leftOut] of lacking(model, "left_out")) {
      const entries = Object.entries(leftOut);
      const list = element("ul", {}, ...entries.map(([id, why]) => element("li", {}, `${id}: ${why}`)));
      const head = element("summary", {}, `${model.name}: not asked of ${entries.length}: ${found}. No mean includes them.`);
      $("left_out").append(element("details", { class: "aside" }, head, list));
    }
  }
  if (!any) $("failures").append(element("p", { class: "fine" }, "Every image was made, and every metric measured every image it applies to."));
}

// Numbers and latency ------------------------------------------------------------------------------------------------

function categoriesOf() {
  return [...new Set(DATA.images.filter((image) => !image.turn).map((image) => image.category))];
}

function drawNumbers(category) {
  const head = element("tr", {}, element("th", {}, ""), ...names.map((name) => element("th", {}, name)));
  const rows = [head];
  for (const number of numbers) {
    const cells = DATA.models.map((model, index) => numberCell(model, index, number, category));
    if (cells.every((cell) => cell === null)) continue;
    const turn = category === "all" ? onlyTurn(number) : undefined;
    const name = turn === undefined ? number : `${number}, ${turn}`;
    const label = element("th", { title: aboutOf(number) }, `${name} ${better[number] === "higher" ? "↑" : "↓"}`);
    if (aboutsOf(number).length > 1) {
      label.append(element("br"), element("small", { class: "worse" }, `not comparable: ${aboutOf(number)}`));
    }
    rows.push(element("tr", {}, label, ...cells.map((cell) => cell ?? element("td", {}, "–"))));
  }
  $("numbers").replaceChildren(...rows);
}

/** Seconds an image, a row for each kind of machine: what was made on two is no sample of either. */
function drawLatency() {
  const machines = [...new Set(DATA.models.flatMap((model) => Object.keys(model.latency)))];
  const rows = [element("tr", {}, element("th", {}, ""), ...names.map((name) => element("th", {}, name)))];
  for (const machine of machines) {
    rows.push(element("tr", {}, element("th", { class: "machine", colspan: names.length + 1 }, machine)));
    const counts = DATA.models.map((model) => element("td", {}, String(model.latency[machine]?.images ?? 0)));
    rows.push(element("tr", {}, element("th", {}, "images"), ...counts));
    for (const [key, label] of [["median_s", "median"], ["p95_s", "95th percentile"]]) {
      const cells = DATA.models.map((model) => model.latency[machine]).map((found) => found?.[key]
        ? element("td", {}, interval(found[key]), element("small", {}, `  n=${found[key].n}`))
        : element("td", {}, found ? "not measured: several at once" : "–"));
      rows.push(element("tr", {}, element("th", {}, `seconds an image, ${label}`), ...cells));
    }
  }
  $("latency").append(element("div", { class: "scroll" }, element("table", {}, ...rows)));
}

/** Where a number is of one turn alone, as the way home of a chain is, that turn. */
function onlyTurn(number) {
  const found = new Set(DATA.models.flatMap((model) => Object.keys(model.numbers[number]?.categories ?? {})));
  return found.size === 1 && !found.has("all") ? [...found][0] : undefined;
}

/** All that gave a number: more than one, and the models' columns are not comparable. */
const aboutsOf = (number) => [...new Set(DATA.models.map((model) => model.numbers[number]?.about).filter(Boolean))];
const aboutOf = (number) => aboutsOf(number).join(" | ");

function numberCell(model, index, number, category) {
  const estimate = model.numbers[number]?.categories[(category === "all" && onlyTurn(number)) || category];
  if (!estimate) return null;
  const of = estimate.of > estimate.n ? ` of ${estimate.of}` : "";
  const cell = element("td", {}, interval(estimate), element("small", {}, `  n=${estimate.n}${of}`));
  const difference = DATA.differences[index][number]?.[category];
  if (index > 0 && difference) {
    const apart = difference.low !== null && (difference.low > 0 || difference.high < 0);
    const good = (difference.value > 0) === (better[number] === "higher");
    const sign = difference.value > 0 ? "+" : "";
    cell.append(element("br"), element("small", { class: apart ? (good ? "better" : "worse") : null }, sign + interval(difference)));
  }
  return cell;
}

function drawOrigin() {
  const abouts = [...new Set(numbers.map((number) => `${number}: ${aboutOf(number)}`))];
  $("origin").append(element("ul", {}, ...abouts.map((about) => element("li", {}, about))));
  for (const model of DATA.models) $("origin").append(element("pre", {}, JSON.stringify(model.settings, null, 1)));
}

// Drift over the turns of chains -------------------------------------------------------------------------------------

function drawDrift() {
  const turns = [...new Set(DATA.images.map((image) => image.turn))].filter(Boolean).sort((a, b) => a - b);
  if (!turns.length) return;
  const charts = numbers.map((number) => chart(number, turns)).filter(Boolean);
  if (!charts.length) return;
  const legend = names.map((name, i) => {
    const square = element("i");
    square.style.background = COLOURS[i % COLOURS.length];
    return element("span", {}, square, name);
  });
  $("drift").append(
    element("h2", {}, "Drift over turns"),
    element("p", { class: "note" }, "Each turn edits the result of the one before and is held against the chain's first image (target_mae: against that turn's right image). Bands are 95 % intervals; n: chains that have the number at that turn. Dashed: the same chains at every turn, where that is not all of them."),
    element("div", { class: "legend" }, ...legend),
    element("div", { class: "charts" }, ...charts));
}

function svg(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** [turn, mean] of the chains that have a number at every turn of its curve: none where those are all chains, or none. */
function sameChains(number, model, curve) {
  const turns = curve.map(([turn]) => turn);
  const chains = rowsOf(DATA.images.filter((image) => turns.includes(image.turn)))
    .map(([, images]) => images.map((image) => image.made[model].values[number]))
    .filter((values) => values.length === turns.length && values.every((value) => value !== undefined));
  if (!chains.length || curve.every(([, estimate]) => estimate.n === chains.length)) return [];
  return turns.map((turn, i) => [turn, chains.reduce((sum, values) => sum + values[i], 0) / chains.length]);
}

function chart(number, turns) {
  const curves = DATA.models.map((model) => turns
    .map((turn) => [turn, model.numbers[number]?.categories[`turn ${turn}`]])
    .filter(([, estimate]) => estimate));
  if (curves.every((curve) => curve.length < 2)) return null;
  const [width, height, left, right, top, bottom] = [300, 204, 56, 18, 28, 40];
  const same = curves.map((curve, i) => sameChains(number, i, curve));
  const ends = [...curves.flat().flatMap(([, e]) => [e.low ?? e.value, e.high ?? e.value]), ...same.flat().map(([, value]) => value)];
  let [low, high] = [Math.min(...ends), Math.max(...ends)];
  if (high === low) [low, high] = [low - 0.5, high + 0.5];
  const span = turns.at(-1) - turns[0] || 1;
  const x = (turn) => left + ((turn - turns[0]) / span) * (width - left - right);
  const y = (value) => top + ((high - value) / (high - low)) * (height - top - bottom);
  const picture = svg("svg", { width, height, role: "img", "aria-label": `${number} by turn` });
  picture.append(svg("text", { x: left, y: 16, class: "name" }, `${number} ${better[number] === "higher" ? "↑" : "↓"}`));
  for (const value of [low, (low + high) / 2, high]) {
    picture.append(svg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), stroke: "#8884" }));
    picture.append(svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, Number(value.toPrecision(2))));
  }
  picture.append(svg("text", { x: left - 12, y: height - 20, "text-anchor": "end" }, "turn"));
  for (const turn of turns) {
    const counts = [...new Set(curves.flat().filter(([t]) => t === turn).map(([, e]) => e.n))];
    picture.append(svg("text", { x: x(turn), y: height - 20, "text-anchor": "middle" }, turn));
    picture.append(svg("text", { x: x(turn), y: height - 6, "text-anchor": "middle", class: "n" }, `n=${counts.join("/")}`));
  }
  curves.forEach((curve, i) => {
    if (!curve.length) return;
    const colour = COLOURS[i % COLOURS.length];
    const up = curve.map(([turn, e]) => `${x(turn)},${y(e.high ?? e.value)}`);
    const down = curve.map(([turn, e]) => `${x(turn)},${y(e.low ?? e.value)}`).reverse();
    picture.append(svg("polygon", { points: [...up, ...down].join(" "), fill: colour, opacity: 0.15 }));
    const line = (points, dashes) => svg("polyline", { points: points.map(([t, value]) => `${x(t)},${y(value)}`).join(" "),
      fill: "none", stroke: colour, "stroke-width": 2, ...dashes });
    picture.append(line(curve.map(([t, e]) => [t, e.value]), {}));
    if (same[i].length) picture.append(line(same[i], { "stroke-dasharray": "4 4", class: "same" }));
  });
  return picture;
}

// Images -------------------------------------------------------------------------------------------------------------

const state = { category: "all", order: 0, rows: [], focus: 0 };
const orders = [
  ["failures first", failureRank],
  ...numbers.flatMap((number) => names.map((name, i) => [`${number} of ${name}, worst first`, worst(number, i)])),
  ["as in the benchmark", () => 0],
];

/** Images that a metric failed on. */
const failed = new Set(DATA.models.flatMap((model) => Object.values(model.numbers).flatMap((found) => Object.keys(found.failed))));

function failureRank(image) {
  if (failed.has(image.id) || image.made.some((made) => made.error !== null)) return -1e9;
  const first = numbers[0];
  if (first === undefined) return 0;
  const sign = better[first] === "higher" ? 1 : -1;
  const found = image.made.map((made) => made.values[first]).filter((value) => value !== undefined);
  return found.length ? sign * found.reduce((a, b) => a + b) / found.length : 1e9;
}

function worst(number, model) {
  const sign = better[number] === "higher" ? 1 : -1;
  return (image) => (image.made[model].values[number] === undefined ? 1e9 : sign * image.made[model].values[number]);
}

/** A single edit is a row; so are all turns of a chain. */
function rowsOf(images) {
  const groups = new Map();
  for (const image of images) {
    const id = image.turn ? `${image.key.replace(/\.turn_\d+$/, "")}@${image.seed}` : image.id;
    if (!groups.has(id)) groups.set(id, []);
    groups.get(id).push(image);
  }
  return [...groups.entries()];
}

function drawRows() {
  const chosen = DATA.images.filter((image) =>
    state.category === "all" || (state.category === "chains" ? image.turn : !image.turn && image.category === state.category));
  const rank = orders[state.order][1];
  const lowest = (images) => Math.min(...images.map(rank));
  state.rows = rowsOf(chosen).map(([id, images], i) => [id, images, lowest(images), i]).sort((a, b) => a[2] - b[2] || a[3] - b[3]);
  $("count").textContent = `${state.rows.length} rows`;
  $("rows").replaceChildren(...state.rows.map(([id, images], index) => drawRow(id, images, index)));
  state.focus = 0;
}

function drawRow(id, images, index) {
  const row = element("div", { class: "row", tabindex: "0", onfocus: () => (state.focus = index) });
  if (images[0].turn) {
    row.append(element("p", {}, element("b", {}, id), `  ${images.map((image) => image.instruction).join(" → ")}`));
    names.forEach((name, model) => {
      const turns = images.map((image, i) => drawMade(image, model, `${name}, ${image.category}`, index, i));
      const start = drawPicture(images[0].contexts[0], "start", () => openViewer(index, 0, 0));
      row.append(element("div", { class: "pictures strip" }, start, ...turns));
    });
    return row;
  }
  const [image] = images;
  row.append(element("p", {}, element("b", {}, image.instruction), element("small", { class: "note" }, `  ${image.id}, ${image.category}`)));
  const pictures = image.contexts.map((file, i) => drawPicture(file, i ? `reference ${i}` : "context", () => openViewer(index, 0, i ? `r${i}` : 0)));
  names.forEach((name, model) => pictures.push(drawMade(image, model, name, index, 0)));
  if (image.target) pictures.push(drawPicture(image.target, "truth", () => openViewer(index, 0, "t")));
  row.append(element("div", { class: "pictures" }, ...pictures));
  return row;
}

function drawMade(image, model, label, row, turn) {
  const made = image.made[model];
  if (made.file === null) return element("div", { class: "gone" }, `${label}: ${made.error}`);
  const shown = numbers.filter((number) => made.values[number] !== undefined).slice(0, 2);
  const values = shown.map((number) => `${number} ${short(made.values[number])}`).join(", ");
  return drawPicture(made.file, values && !image.turn ? `${label}: ${values}` : label, () => openViewer(row, turn, model + 1));
}

function drawPicture(file, label, onclick) {
  const image = element("img", { src: file, alt: label, loading: "lazy", onclick, onload: () => image.classList.toggle("tiny", image.naturalHeight < 180) });
  return element("figure", {}, image, element("figcaption", {}, label));
}

// The viewer ---------------------------------------------------------------------------------------------------------

const view = { row: 0, turn: 0, choice: 0, before: null, timer: null, back: null };
const seen = () => state.rows[view.row][1][view.turn];

function choices() {
  const image = seen();
  const found = [];
  image.contexts.forEach((file, i) => found.push(i ? [`r${i}`, `r reference ${i}`, file] : [0, "0 context", file]));
  names.forEach((name, i) => found.push([i + 1, `${i + 1} ${name}`, image.made[i].file]));
  if (image.target) found.push(["t", "t truth", image.target]);
  return found.filter(([, , file]) => file !== null);
}

function openViewer(row, turn, choice) {
  Object.assign(view, { row, turn, choice, back: null, before: null });
  if (!$("viewer").open) $("viewer").showModal();
  drawViewer();
}

function drawViewer() {
  const image = seen();
  const options = choices();
  if (!options.length) {
    $("big").removeAttribute("src");
    $("big").alt = "";
    $("choices").replaceChildren();
    $("caption").textContent = `${image.id}: nothing to show`;
    return;
  }
  const chosen = options.find(([id]) => id === view.choice) ?? options[0];
  view.choice = chosen[0];
  $("big").src = chosen[2];
  $("big").alt = chosen[1];
  $("big").onload = () => $("big").classList.toggle("tiny", $("big").naturalHeight < 180);
  $("choices").replaceChildren(...options.map(([id, label]) =>
    element("button", { "aria-pressed": String(id === view.choice), onclick: () => show(id) }, label)));
  const values = typeof view.choice === "number" && view.choice > 0 ? image.made[view.choice - 1].values : {};
  const told = Object.entries(values).map(([number, value]) => `${number} ${short(value)}`).join(", ");
  $("caption").textContent = `${image.instruction} (${image.id}, ${image.category}) ${told}`;
}

function show(choice) {
  if (choice !== view.choice && choices().some(([id]) => id === choice)) view.before = view.choice;
  view.back = null;
  view.choice = choice;
  drawViewer();
}

function nextReference() {
  const references = choices().map(([id]) => id).filter((id) => /^r\d+$/.test(id));
  if (references.length) show(references[(references.indexOf(view.choice) + 1) % references.length]);
}

/** Between the two pictures that were chosen last: two models, or one and the truth. */
function swap() {
  const one = names.length > 1 ? 2 : "t";
  show(view.before ?? (view.choice === 1 ? one : 1));
}

/** Between the context and what was shown before it. */
function toggle() {
  if (view.choice !== 0) {
    view.back = view.choice;
    view.choice = 0;
  } else {
    view.choice = view.back ?? 1;
  }
  const back = view.back;
  drawViewer();
  view.back = back;
}

function flicker(between) {
  const running = view.timer !== null;
  stopFlicker();
  if (!running) view.timer = setInterval(between, 400);
}

function stopFlicker() {
  clearInterval(view.timer);
  view.timer = null;
}

function step(by) {
  const turn = view.turn + by;
  if (turn >= 0 && turn < state.rows[view.row][1].length) view.turn = turn;
  else {
    view.row = Math.min(Math.max(view.row + by, 0), state.rows.length - 1);
    view.turn = by > 0 ? 0 : state.rows[view.row][1].length - 1;
  }
  drawViewer();
}

// Keys ---------------------------------------------------------------------------------------------------------------

function focusRow(by) {
  const index = document.activeElement?.classList.contains("row") ? state.focus + by : state.focus;
  const row = $("rows").children[Math.min(Math.max(index, 0), state.rows.length - 1)];
  row?.focus();
}

function next(select) {
  select.selectedIndex = (select.selectedIndex + 1) % select.options.length;
  select.dispatchEvent(new Event("change"));
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
  if (event.key === "?" || $("help").open) {
    if (event.key === "?") $("help").open ? $("help").close() : $("help").showModal();
    return;
  }
  const inViewer = $("viewer").open;
  const own = inViewer
    ? { ArrowRight: () => step(1), ArrowLeft: () => step(-1), j: () => step(1), k: () => step(-1), t: () => show("t"), r: nextReference,
        " ": toggle, f: () => flicker(toggle), x: swap, g: () => flicker(swap), z: () => $("stage").classList.toggle("zoomed") }
    : { j: () => focusRow(1), k: () => focusRow(-1), c: () => next($("category")), s: () => next($("order")),
        Enter: () => state.rows.length && openViewer(state.focus, 0, 1) };
  if (inViewer && /^[0-9]$/.test(event.key)) own[event.key] = () => show(Number(event.key));
  if (event.key === "Enter" && event.target.tagName === "SUMMARY") return;
  if (own[event.key]) {
    event.preventDefault();
    own[event.key]();
  }
});
$("viewer").addEventListener("close", stopFlicker);

// Start --------------------------------------------------------------------------------------------------------------

document.title = `${DATA.benchmark}: ${names.join(", ")}`;
$("title").textContent = document.title;
const shownCategories = ["all", ...categoriesOf(), ...(DATA.images.some((image) => image.turn) ? ["chains"] : [])];
$("category").append(...shownCategories.map((name) => element("option", {}, name)));
$("order").append(...orders.map(([name], i) => element("option", { value: i }, name)));
$("category").addEventListener("change", () => {
  state.category = $("category").value;
  drawNumbers(state.category === "chains" ? "all" : state.category);
  drawRows();
});
$("order").addEventListener("change", () => {
  state.order = Number($("order").value);
  drawRows();
});
drawFailures();
drawNumbers("all");
drawLatency();
drawOrigin();
drawDrift();
drawRows();
