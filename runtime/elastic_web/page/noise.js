// Normal noise by numpy's arithmetic, so that a seed is the same picture here and in Python: `np.random.default_rng(seed)` and its
// `standard_normal`. NEP 19 keeps both streams as they are.

const MASK32 = 0xffffffffn, MASK64 = (1n << 64n) - 1n, MASK128 = (1n << 128n) - 1n;

// The words that numpy's SeedSequence makes of an entropy (M. O'Neill's seed_seq_fe128).
function seedWords(seed, count) {
  const entropy = [];
  for (let rest = seed; rest > 0n || entropy.length === 0; rest >>= 32n) entropy.push(Number(rest & MASK32));
  let factor = 0x43b0d7e5;
  const hashed = value => {
    value ^= factor;
    factor = Math.imul(factor, 0x931e8875);
    value = Math.imul(value, factor);
    return value ^ (value >>> 16);
  };
  const mixed = (one, other) => {
    const value = Math.imul(0xca01f9dd, one) - Math.imul(0x4973f715, other) | 0;
    return value ^ (value >>> 16);
  };
  const pool = Array.from({length: 4}, (_, i) => hashed(entropy[i] ?? 0));
  for (let from = 0; from < 4; from++)
    for (let to = 0; to < 4; to++) if (from !== to) pool[to] = mixed(pool[to], hashed(pool[from]));
  for (const word of entropy.slice(4)) for (let to = 0; to < 4; to++) pool[to] = mixed(pool[to], hashed(word));
  factor = 0x8b51f9dd;
  return Array.from({length: count}, (_, i) => {
    let value = pool[i % 4] ^ factor;
    factor = Math.imul(factor, 0x58f38ded);
    value = Math.imul(value, factor);
    return (value ^ (value >>> 16)) >>> 0;
  });
}

// PCG64: a linear congruential generator of 128 bits, whose output is XSL-RR (M. O'Neill, HMC-CS-2014-0905).
class Pcg64 {
  static FACTOR = 0x2360ed051fc65da44385df649fccf645n;

  constructor(seed) {
    const words = seedWords(seed, 8).map(BigInt);
    const [high, low, highStep, lowStep] = [0, 2, 4, 6].map(i => words[i] | (words[i + 1] << 32n));
    this.increment = ((((highStep << 64n) | lowStep) << 1n) | 1n) & MASK128;
    this.state = 0n;
    this.step();
    this.state = (this.state + ((high << 64n) | low)) & MASK128;
    this.step();
  }

  step() { this.state = (this.state * Pcg64.FACTOR + this.increment) & MASK128; }

  next() {
    this.step();
    const folded = (this.state >> 64n) ^ (this.state & MASK64), turn = this.state >> 122n;
    return ((folded >> turn) | (folded << (64n - turn))) & MASK64;
  }

  uniform() { return Number(this.next() >> 11n) / 2 ** 53; }
}

// The ziggurat of 256 layers of equal area (Marsaglia and Tsang, Journal of Statistical Software 5(8), 2000), in 52 bits.
const EDGE = 3.654152885361009, AREA = 0.004928673233974658, BITS = 2 ** 52;
const density = x => Math.exp(-0.5 * x * x);

function ziggurat() {
  const within = new Float64Array(256), width = new Float64Array(256), height = new Float64Array(256);
  let x = EDGE, last = EDGE;
  const base = AREA / density(EDGE);
  within[0] = Math.floor(EDGE / base * BITS);
  width[0] = base / BITS;
  width[255] = EDGE / BITS;
  height[0] = 1;
  height[255] = density(EDGE);
  for (let layer = 254; layer >= 1; layer--) {
    x = Math.sqrt(-2 * Math.log(AREA / x + density(x)));
    within[layer + 1] = Math.floor(x / last * BITS);
    width[layer] = x / BITS;
    height[layer] = density(x);
    last = x;
  }
  return {within, width, height};
}

/** A source of normal numbers for a seed, a whole number from 0 (a number, a BigInt or its digits). */
export class Source {
  static tables = ziggurat();

  constructor(seed) { this.bits = new Pcg64(BigInt(seed)); }

  normal() {
    const {within, width, height} = Source.tables;
    for (;;) {
      const word = this.bits.next(), layer = Number(word & 0xffn), size = Number((word >> 9n) & ((1n << 52n) - 1n));
      const x = size * width[layer] * ((word >> 8n) & 1n ? -1 : 1);
      if (size < within[layer]) return x;
      if (layer === 0) return (word >> 17n) & 1n ? -this.tail() : this.tail();
      if ((height[layer - 1] - height[layer]) * this.bits.uniform() + height[layer] < density(x)) return x;
    }
  }

  tail() {
    for (;;) {
      const x = -Math.log1p(-this.bits.uniform()) / EDGE, y = -Math.log1p(-this.bits.uniform());
      if (y + y > x * x) return EDGE + x;
    }
  }

  /** `count` of them, Float64Array. */
  normals(count) { return Float64Array.from({length: count}, () => this.normal()); }
}
