// The mask's area over the last minute, drawn on a canvas.

const SECONDS = 60;

export class Curve {
  constructor(canvas) {
    this.canvas = canvas;
    this.points = [];
    this.color = "#28dcff";
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  clear() {
    this.points = [];
    this.draw();
  }

  // points: [[seconds, fraction of the frame], ...], newer than those there are.
  add(points) {
    const last = this.points.length ? this.points[this.points.length - 1][0] : -1;
    this.points.push(...points.filter(([at]) => at > last));
    const from = this.points.length ? this.points[this.points.length - 1][0] - SECONDS - 2 : 0;
    this.points.splice(0, Math.max(0, this.points.findIndex(([at]) => at >= from)));
    this.draw();
  }

  draw() {
    const { canvas, points } = this;
    const ratio = window.devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width || !height) return;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const paint = canvas.getContext("2d");
    paint.setTransform(ratio, 0, 0, ratio, 0, 0);
    paint.clearRect(0, 0, width, height);
    const left = 44, right = width - 8, top = 10, bottom = height - 22;
    const most = niceCeiling(Math.max(0.001, ...points.map(([, value]) => value)));
    const end = points.length ? points[points.length - 1][0] : SECONDS;
    const x = (at) => right - ((end - at) / SECONDS) * (right - left);
    const y = (value) => bottom - (value / most) * (bottom - top);

    paint.font = "12px system-ui, sans-serif";
    paint.fillStyle = "#93a1ad";
    paint.strokeStyle = "#222b33";
    paint.lineWidth = 1;
    paint.textBaseline = "middle";
    paint.textAlign = "right";
    for (const share of [0, 0.5, 1]) {
      const level = Math.round(y(most * share)) + 0.5;
      paint.beginPath();
      paint.moveTo(left, level);
      paint.lineTo(right, level);
      paint.stroke();
      paint.fillText(percent(most * share), left - 6, level);
    }
    paint.textBaseline = "alphabetic";
    paint.textAlign = "left";
    paint.fillText("60 s ago", left, height - 5);
    paint.textAlign = "right";
    paint.fillText("now", right, height - 5);

    const seen = points.filter(([at]) => at >= end - SECONDS);
    if (!seen.length) return;
    paint.beginPath();
    seen.forEach(([at, value], i) => (i ? paint.lineTo(x(at), y(value)) : paint.moveTo(x(at), y(value))));
    paint.strokeStyle = this.color;
    paint.lineWidth = 2;
    paint.lineJoin = "round";
    paint.stroke();
    paint.lineTo(x(seen[seen.length - 1][0]), bottom);
    paint.lineTo(x(seen[0][0]), bottom);
    paint.closePath();
    paint.globalAlpha = 0.16;
    paint.fillStyle = this.color;
    paint.fill();
    paint.globalAlpha = 1;
    const [at, value] = seen[seen.length - 1];
    paint.beginPath();
    paint.arc(x(at), y(value), 3.5, 0, 2 * Math.PI);
    paint.fillStyle = "#fff";
    paint.fill();
  }
}

export function percent(fraction) {
  const value = 100 * fraction;
  return `${value.toFixed(value >= 10 || value === 0 ? 0 : value >= 1 ? 1 : 2)} %`;
}

function niceCeiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return Math.min(1, [1, 2, 2.5, 5, 10].map((step) => step * power).find((step) => step >= value * 1.05));
}
