// Trying the service in the browser: an image is posted, its mask comes back and is drawn over it here.

export class Trial {
  constructor(screen, showAlert, showArea) {
    Object.assign(this, { screen, showAlert, showArea, file: null, picture: null, mask: null, color: [40, 220, 255] });
  }

  async take(file, settings) {
    try {
      this.picture = await createImageBitmap(file);
    } catch {
      this.showAlert("This browser cannot show that image. Choose a JPEG, PNG, WebP or BMP file.");
      return false;
    }
    this.file = file;
    this.mask = null;
    return this.ask(settings);
  }

  async ask({ modality, threshold, opacity, color }) {
    if (!this.file) return false;
    const query = new URLSearchParams({ modality, threshold });
    const asked = (this.asked = {});
    let answer;
    try {
      answer = await fetch(`v1/segment?${query}`, { method: "POST", body: this.file, headers: { Accept: "image/png" } });
    } catch {
      this.showAlert("The server does not answer.");
      return false;
    }
    if (asked !== this.asked) return false; // another one was asked for since
    if (!answer.ok) {
      const { error, hint } = await answer.json();
      this.showAlert(`${error} ${hint}`);
      return false;
    }
    this.mask = await createImageBitmap(await answer.blob());
    this.showAlert("");
    this.draw(color, opacity);
    return true;
  }

  draw(color, opacity) {
    if (!this.picture || !this.mask) return;
    const { width, height } = this.mask;
    const tint = new OffscreenCanvas(width, height);
    const paint = tint.getContext("2d", { willReadFrequently: true });
    paint.drawImage(this.mask, 0, 0);
    const pixels = paint.getImageData(0, 0, width, height);
    const [red, green, blue] = [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));
    let area = 0;
    for (let i = 0; i < pixels.data.length; i += 4) {
      const inside = pixels.data[i] > 127;
      area += inside;
      pixels.data[i] = red;
      pixels.data[i + 1] = green;
      pixels.data[i + 2] = blue;
      pixels.data[i + 3] = inside ? Math.round(255 * opacity) : 0;
    }
    paint.putImageData(pixels, 0, 0);
    this.screen.width = width;
    this.screen.height = height;
    const onto = this.screen.getContext("2d");
    onto.drawImage(this.picture, 0, 0, width, height);
    onto.drawImage(tint, 0, 0);
    this.showArea(area / (width * height), area, null);
  }
}
