// The live part of the page: it follows /events and keeps what the server has written up to date.
// Text from the pool only ever becomes text: nothing here makes HTML out of it.
"use strict";
(() => {
  const ROWS = 100;
  const SQUARES_FROM = 13;
  const body = document.body;
  const find = (id) => document.getElementById(id);
  const canRestart = (body.dataset.actions || "").split(" ").includes("restart");

  const make = (name, attributes = {}, ...children) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const put = (element, text) => {
    if (element && element.textContent !== text) element.textContent = text;
  };

  // numbers and times for people, as the server writes them

  const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
  const plain = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
  const number = (value) => {
    if (value === null || value === undefined) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    return size >= 10000 || size < 0.001 ? compact.format(value) : plain.format(value);
  };
  const duration = (value) => {
    if (value === null || value === undefined) return "–";
    const parts = [];
    let rest = Math.floor(value);
    for (const [name, size] of [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]]) {
      if (rest >= size || (name === "s" && !parts.length)) {
        parts.push(`${Math.floor(rest / size)} ${name}`);
        rest %= size;
      } else if (parts.length) break;
    }
    return parts.slice(0, 2).join(" ");
  };
  const seconds = (value) =>
    value !== null && value < 10 ? `${value.toFixed(1)} s` : duration(value);

  // curves

  const SVG = "http://www.w3.org/2000/svg";
  const svg = (name, attributes) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const curves = { generation: -1, names: [], points: [], tail: null, isLoading: false };
  const WIDTH = 600;
  const HEIGHT = 100;

  const niceCeiling = (value) => {
    if (value <= 0) return 1;
    const power = 10 ** Math.floor(Math.log10(value));
    return [1, 2, 2.5, 5, 10].find((step) => step * power >= value) * power;
  };
  const range = (values, fromZero) => {
    let low = Math.min(...values);
    let high = Math.max(...values);
    if (fromZero && low >= 0) return [0, niceCeiling(high)];
    if (low === high) [low, high] = [low - 1, high + 1];
    const step = niceCeiling((high - low) / 4);
    return [Math.floor(low / step) * step, Math.ceil(high / step) * step];
  };

  const labelOf = (name) => {
    const label = name.replace(/^learner: /, "").replaceAll("_", " ");
    return label.charAt(0).toUpperCase() + label.slice(1);
  };

  class Chart {
    constructor(names, label) {
      this.names = names;
      this.name = names[0];
      this.cursor = null;
      this.drawn = [];
      this.readout = make("span", { class: "readout", "aria-live": "off" });
      this.select = label ? null : make("select", { "aria-label": "Curve of the third chart" });
      const caption = make("figcaption", {}, this.select || make("strong", {}, label), this.readout);
      this.scale = make("div", { class: "scale", "aria-hidden": "true" });
      for (let index = 0; index < 3; index += 1) this.scale.append(make("span"));
      this.times = make("div", { class: "times", "aria-hidden": "true" }, make("span"), make("span"));
      this.svg = svg("svg", {
        viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", tabindex: "0", role: "img",
      });
      for (const y of [0, HEIGHT / 2, HEIGHT]) {
        this.svg.append(svg("line", { class: "grid", x1: 0, x2: WIDTH, y1: y, y2: y }));
      }
      this.area = svg("path", { class: "area" });
      this.curve = svg("path", { class: "curve" });
      this.line = svg("line", { class: "cursor", y1: 0, y2: HEIGHT, visibility: "hidden" });
      this.svg.append(this.area, this.curve, this.line);
      const plot = make("div", { class: "plot" }, this.scale, this.svg, this.times);
      this.figure = make("figure", {}, caption, plot);
      this.svg.addEventListener("pointermove", (event) => {
        const box = this.svg.getBoundingClientRect();
        this.pointAt((event.clientX - box.left) / box.width);
      });
      for (const name of ["pointerleave", "blur"]) {
        this.svg.addEventListener(name, () => this.moveTo(null));
      }
      this.svg.addEventListener("keydown", (event) => {
        const last = this.drawn.length - 1;
        const from = this.cursor === null ? last + 1 : this.cursor;
        const to = { ArrowLeft: from - 1, ArrowRight: from + 1, Home: 0, End: last }[event.key];
        if (to === undefined || last < 0) return;
        event.preventDefault();
        this.moveTo(Math.max(0, Math.min(last, to)));
      });
      if (this.select) {
        this.select.addEventListener("change", () => {
          this.name = this.select.value;
          this.chosen = true;
          this.draw();
        });
      }
    }

    offer(names) {
      if (!this.select || names.join() === this.offered) return;
      this.offered = names.join();
      if (!this.chosen && names.length) this.name = names[0];
      this.select.replaceChildren(
        ...names.map((name) => make("option", { value: name }, labelOf(name))),
      );
      this.select.value = this.name;
    }

    pointAt(share) {
      if (!this.drawn.length) return;
      const [first, last] = [this.drawn[0][0], this.drawn[this.drawn.length - 1][0]];
      const time = first + share * (last - first);
      let nearest = 0;
      this.drawn.forEach(([at], index) => {
        if (Math.abs(at - time) < Math.abs(this.drawn[nearest][0] - time)) nearest = index;
      });
      this.moveTo(nearest);
    }

    moveTo(cursor) {
      this.cursor = cursor;
      this.readout.setAttribute("aria-live", cursor === null ? "off" : "polite");
      this.say();
    }

    say() {
      const { drawn } = this;
      const isAt = this.cursor !== null && this.cursor < drawn.length;
      const point = isAt ? drawn[this.cursor] : drawn[drawn.length - 1];
      this.line.setAttribute("visibility", isAt ? "visible" : "hidden");
      if (!point) {
        put(this.readout, "–");
        return;
      }
      if (isAt) {
        this.line.setAttribute("x1", this.x(point[0]));
        this.line.setAttribute("x2", this.x(point[0]));
      }
      put(this.readout, isAt ? `${number(point[1])} at ${duration(point[0])}` : number(point[1]));
    }

    draw() {
      const points = curves.tail ? [...curves.points, curves.tail] : curves.points;
      this.drawn = points
        .filter((point) => point.v[this.name] !== undefined && point.v[this.name] !== null)
        .map((point) => [point.t, point.v[this.name]]);
      const { drawn } = this;
      const fromZero = !/return|learner/.test(this.name);
      const [low, high] = drawn.length ? range(drawn.map(([, y]) => y), fromZero) : [0, 1];
      const first = drawn.length ? drawn[0][0] : 0;
      const last = drawn.length ? drawn[drawn.length - 1][0] : 1;
      this.x = (time) => ((time - first) / Math.max(last - first, 1e-9)) * WIDTH;
      const y = (value) => HEIGHT - ((value - low) / (high - low)) * HEIGHT;
      const path = drawn
        .map(([time, value]) => `${this.x(time).toFixed(1)} ${y(value).toFixed(1)}`)
        .join("L");
      const several = drawn.length > 1;
      this.curve.setAttribute("d", several ? `M${path}` : "");
      this.area.setAttribute("d", several && low === 0 ? `M0 ${HEIGHT}L${path}L${WIDTH} ${HEIGHT}Z` : "");
      [high, (low + high) / 2, low].forEach((value, index) => {
        put(this.scale.children[index], drawn.length ? number(value) : "");
      });
      put(this.times.children[0], several ? duration(first) : "");
      put(this.times.children[1], several ? duration(last) : "not enough data yet");
      const newest = drawn.length ? number(drawn[drawn.length - 1][1]) : "no data";
      this.svg.setAttribute(
        "aria-label", `${labelOf(this.name)} over time, now ${newest}; the arrow keys read its points`,
      );
      this.say();
    }
  }

  const charts = [
    new Chart(["steps/s"], "Steps per second"),
    new Chart(["queued"], "Batches queued"),
    new Chart(["return"], ""),
  ];
  find("charts").append(...charts.map((chart) => chart.figure));
  find("charts").hidden = false;

  const drawCharts = () => {
    const first = ["return", "staleness", "ready", "batches/s"];
    const others = curves.names.filter((name) => !["steps/s", "queued", ...first].includes(name));
    const known = first.filter((name) => name === "return" || curves.names.includes(name));
    const returns = others.filter((name) => name.includes("return"));
    charts[2].offer(curves.names.includes("return") || !returns.length
      ? [...known, ...others]
      : [...new Set([...returns, ...known, ...others])]);
    for (const chart of charts) chart.draw();
  };

  const loadCurves = async () => {
    if (curves.isLoading) return;
    curves.isLoading = true;
    try {
      const response = await fetch("curves.json");
      if (response.ok) Object.assign(curves, await response.json());
    } catch { /* the next state asks again */ } finally {
      curves.isLoading = false;
    }
    drawCharts();
  };

  const followCurves = (state) => {
    const { generation, closed, last, names } = state.curves;
    const missing = closed - curves.points.length;
    const { numbers, rates } = state;
    curves.tail = numbers && {
      t: numbers.seconds, v: { ...rates, queued: numbers.queued, ready: numbers.ready },
    };
    if (generation !== curves.generation || missing < 0 || missing > last.length) {
      loadCurves();
      return;
    }
    curves.names = names;
    if (missing > 0) curves.points.push(...last.slice(-missing));
    drawCharts();
  };

  // workers

  const table = find("table");
  const rows = table.tBodies[0];
  const empty = find("empty");
  const overview = find("overview");
  const tools = find("table-tools");
  const filter = make("select", { "aria-label": "Workers shown" },
    make("option", { value: "all" }, "All workers"),
    make("option", { value: "trouble" }, "Not running, or failed lately"));
  const earlier = make("button", { type: "button", "aria-label": "Earlier workers" }, "‹");
  const later = make("button", { type: "button", "aria-label": "Later workers" }, "›");
  const where = make("span", { class: "quiet" });
  tools.append(filter, earlier, where, later);
  let page = 0;
  let newest = null;
  filter.addEventListener("change", () => { page = 0; showWorkers(); });
  earlier.addEventListener("click", () => { page -= 1; showWorkers(); });
  later.addEventListener("click", () => { page += 1; showWorkers(); });

  const KINDS = [...table.tHead.rows[0].cells].map((cell) => cell.className);
  const addRow = () => {
    const row = rows.insertRow();
    row.append(make("th", { scope: "row" }));
    for (let index = 1; index < 11; index += 1) row.append(make("td", { class: KINDS[index] }));
    if (canRestart) {
      row.append(make("td", {},
        make("form", { method: "post", action: "actions/restart" },
          make("input", { type: "hidden", name: "worker_id" }), make("button", {}, make("span", {}, "Restart")))));
    }
    return row;
  };

  const fillRow = (row, values) => {
    const shown = [...values];
    shown[3] = seconds(values[3]);
    shown[4] = duration(values[4]);
    shown[7] = whole.format(values[7]);
    shown.forEach((value, index) => {
      put(row.cells[index], value === null || value === "" ? "–" : String(value));
    });
    if (row.dataset.state !== values[1]) row.dataset.state = values[1];
    if (canRestart) {
      const form = row.cells[11].firstElementChild;
      const id = String(values[0]);
      if (form.elements.worker_id.value !== id || !form.lastElementChild.ariaLabel) {
        form.elements.worker_id.value = id;
        form.lastElementChild.setAttribute("aria-label", `Restart worker ${id}`);
      }
    }
  };

  function showWorkers() {
    if (!newest) return;
    const all = newest.workers;
    const chosen = filter.value === "all"
      ? all : all.filter((values) => values[1] !== "running" || values[8] > 0);
    page = Math.max(0, Math.min(page, Math.ceil(chosen.length / ROWS) - 1));
    const shown = chosen.slice(page * ROWS, (page + 1) * ROWS);
    while (rows.rows.length > shown.length) rows.deleteRow(-1);
    while (rows.rows.length < shown.length) addRow();
    shown.forEach((values, index) => fillRow(rows.rows[index], values));
    const isPaged = chosen.length > ROWS;
    earlier.hidden = later.hidden = where.hidden = !isPaged;
    earlier.disabled = page === 0;
    later.disabled = (page + 1) * ROWS >= chosen.length;
    filter.hidden = all.length < 2;
    const first = page * ROWS + 1;
    put(where, isPaged ? `${first}–${first + shown.length - 1} of ${chosen.length}` : "");
    overview.hidden = all.length < SQUARES_FROM;
    if (!overview.hidden) {
      while (overview.children.length > all.length) overview.lastElementChild.remove();
      while (overview.children.length < all.length) overview.append(make("i"));
      all.forEach((values, index) => {
        const square = overview.children[index];
        if (square.dataset.state !== values[1]) {
          square.dataset.state = values[1];
          square.title = `worker ${values[0]}: ${values[1]}`;
        }
      });
    }
    if (empty) empty.hidden = all.length > 0;
  }

  // incidents

  const list = find("list");
  let incidentsShown = list.querySelectorAll("details").length ? -1 : 0;
  const incident = (one) => {
    const when = `${new Date(one.time * 1000).toISOString().slice(0, 19).replace("T", " ")} UTC`;
    const details = make("details", { "data-number": one.number },
      make("summary", {}, make("time", {}, when), " ",
        make("span", { class: "cause" }, one.cause), ` ${one.summary}`));
    for (const [key, label] of [["traceback", "Traceback"], ["stderr", "Standard error"]]) {
      if (one[key]) details.append(make("h3", {}, label), make("pre", {}, one[key]));
    }
    if (!one.traceback && !one.stderr) {
      details.append(make("p", { class: "quiet" }, "It left neither a traceback nor output."));
    }
    return details;
  };

  const showIncidents = async (count) => {
    if (count === incidentsShown) return;
    incidentsShown = count;
    try {
      const response = await fetch("incidents.json");
      const incidents = await response.json();
      const known = new Map(
        [...list.querySelectorAll("details")].map((one) => [one.dataset.number, one]),
      );
      list.replaceChildren(
        ...incidents.map((one) => known.get(String(one.number)) || incident(one)),
      );
      if (!incidents.length) list.append(make("p", { class: "quiet" }, "None so far."));
      put(find("count"), incidents.length < count
        ? `the newest ${incidents.length} of ${count}` : String(count));
    } catch {
      incidentsShown = -1;
    }
  };

  // what visitors may do

  const notice = find("notice");
  let noticeTimer = 0;
  const tell = (text, kind) => {
    put(notice, text);
    notice.className = `banner ${kind}`;
    notice.hidden = !text;
    clearTimeout(noticeTimer);
    if (kind !== "bad") noticeTimer = setTimeout(() => { notice.hidden = true; }, 4000);
  };

  document.addEventListener("submit", async (event) => {
    const form = event.target;
    event.preventDefault();
    const button = form.querySelector("button");
    button.disabled = true;
    try {
      const response = await fetch(form.action, {
        method: "POST",
        body: new URLSearchParams(new FormData(form)),
        headers: { accept: "application/json" },
      });
      tell((await response.json()).text, response.ok ? "good" : "bad");
    } catch {
      tell("The server did not answer.", "bad");
    }
    button.disabled = false;
    if (newest) showControls(newest);
  });

  function showControls(state) {
    const controls = find("controls");
    if (!controls) return;
    const isLive = ["running", "paused"].includes(state.state);
    for (const form of controls.querySelectorAll("form")) {
      const action = form.getAttribute("action");
      const isOff = !isLive || (action === "actions/pause" && state.state === "paused")
        || (action === "actions/resume" && state.state === "running");
      form.querySelector("button").disabled = isOff;
    }
  }

  // the stream

  let noticeShown = null;
  const show = (state) => {
    if (state.token !== body.dataset.token) {
      location.reload(); // another process serves at this address now
      return;
    }
    newest = state;
    const { numbers, rates } = state;
    put(find("state"), state.state);
    find("state").dataset.state = state.state;
    put(find("uptime"), numbers ? duration(numbers.seconds) : "");
    put(find("failure"), state.failure || "");
    find("failure").hidden = !state.failure;
    if (noticeShown !== null && state.notice[0] > noticeShown) tell(state.notice[1], "bad");
    [noticeShown] = state.notice;
    for (const tile of document.querySelectorAll("[data-tile]")) {
      const name = tile.dataset.tile;
      const value = name in rates ? rates[name] : numbers && numbers[name];
      let text = value === null || value === undefined ? "–" : whole.format(value);
      if (value >= 1e7) text = compact.format(value);
      if (name === "ready" && numbers) text = `${numbers.ready} of ${numbers.workers}`;
      put(tile, text);
    }
    showWorkers();
    showControls(state);
    followCurves(state);
    showIncidents(numbers ? numbers.incidents : 0);
    body.dataset.sequence = state.sequence;
  };

  const link = find("link");
  let source = null;
  let retry = 0;
  let wait = 300;
  let lastHeard = 0;
  const disconnect = () => {
    clearTimeout(retry);
    if (source) source.close();
    source = null;
  };
  const connect = () => {
    disconnect();
    source = new EventSource("events");
    source.addEventListener("state", (event) => {
      lastHeard = Date.now();
      wait = 300;
      put(link, "");
      show(JSON.parse(event.data));
    });
    source.onerror = () => {
      // The server ends each stream after a while, and whenever it is to end itself.
      disconnect();
      const isStopped = newest && newest.state === "stopped";
      retry = setTimeout(connect, isStopped ? 10000 : wait);
      wait = Math.min(wait * 2, 10000);
      setTimeout(() => {
        if (Date.now() - lastHeard > 2500 && !isStopped) put(link, "not connected, trying again …");
      }, 2500);
    };
  };
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) disconnect(); else connect();
  });
  loadCurves();
  if (!document.hidden) connect();
})();
