//! What a segment takes of memory, in a way to split it.
//!
//! A step in micro-batches goes through them one after the other, or in a pipeline through as many at a time as there are
//! stages from one on. So what a segment keeps is of two kinds: what is there once, its variables, their copies and the
//! gradients that are added up, and what each micro-batch in flight has between its forward and its backward pass.

use super::looks::Seen;
use super::price::{Prices, Taken};
use super::segments::Content;
use super::split::Pipeline;

/// Bytes of a segment.
#[derive(Clone, Copy)]
pub struct Bytes {
    /// There all the time, once.
    pub fixed: f64,
    /// Of each micro-batch in flight; 0 where the step goes in one.
    pub flight: f64,
    /// More than both, while the segment runs itself.
    pub transient: f64,
}

impl Bytes {
    /// Bytes that stay, for each of a pipeline's stages if the segments are shared out evenly: a stage has its part of them,
    /// and of that the activations of as many micro-batches as it has in flight.
    pub fn kept(&self, pipeline: Pipeline) -> f64 {
        self.fixed / pipeline.depth as f64 + pipeline.in_flight(0) as f64 / pipeline.depth as f64 * self.flight
    }
}

/// Bytes of a segment that is split in that way: as it is, and with its block made again.
pub fn bytes(prices: &mut Prices, seen: &mut Seen, content: &Content, way: usize) -> [Bytes; 2] {
    let mut variables = 0.0;
    for (shape, n) in &content.variables {
        let region = prices.site.region(shape, prices.site.split(shape, seen.ways[way]));
        variables += (region.elements() * shape.element * n) as f64;
    }
    let in_parts = prices.site.pipeline.micro > 1;
    // Bytes at the ends of the first three phases; of the first what is gone in the next one, and of that what is made again.
    let (mut ends, mut flight, mut inside) = ([0.0; 3], 0.0, 0.0);
    let mut change = vec![0.0; content.length + 2];
    let mut alive = |from: (usize, u8), mut to: (usize, u8), bytes: f64, remade: bool| {
        let over = [0, 1, 2].map(|end| from.1 <= end && to.1 > end);
        ends.iter_mut().zip(over).for_each(|(sum, over)| *sum += if over { bytes } else { 0.0 });
        if over[0] && !over[1] {
            flight += bytes;
            inside += if remade { bytes } else { 0.0 };
        }
        // Gradients that are added up are there anyway, but for the one that is being made.
        if in_parts && (over[1] || over[2]) {
            to = from;
        }
        change[from.0] += bytes;
        change[to.0 + 1] -= bytes;
    };
    for value in &content.kept {
        let element = prices.element(value.kind);
        let mut last = (value.from, value.phase);
        let mut copies: Vec<(usize, (usize, u8), (usize, u8))> = vec![];
        for (step, phase, by) in &value.readers {
            let mut copied = false;
            if let Some((kind, input)) = by {
                let Taken { needs: need, moved, .. } = *seen.taken(prices, *kind, way, *input);
                if moved {
                    match copies.iter_mut().find(|(r, ..)| *r == need) {
                        Some((_, _, to)) => {
                            *to = (*to).max((*step, *phase));
                            copied = !prices.is_apart(need);
                        }
                        None => copies.push((need, (*step, *phase), (*step, *phase))),
                    }
                }
            }
            if !copied {
                last = last.max((*step, *phase));
            }
        }
        let bytes = |elements: usize| (elements * element) as f64;
        let held = seen.node(prices, value.kind, way).held.region.elements();
        alive((value.from, value.phase), last, bytes(held), value.inside);
        // What lies apart from what the device has is there without that.
        let copied = |need: usize| match prices.elements(need) {
            all if prices.is_apart(need) && held < all => all - held,
            all => all,
        };
        copies.iter().for_each(|(r, from, to)| alive(*from, *to, bytes(copied(*r)), value.inside));
    }
    let (mut now, mut most) = (0.0, 0.0f64);
    for c in change {
        now += c;
        most = most.max(now);
    }
    let [turn, next, behind] = ends;
    let of = |made_again: f64| {
        let (fixed, flight) = match in_parts {
            true => (next.max(behind), flight - made_again),
            false => ((turn - made_again).max(behind), 0.0),
        };
        let there = if in_parts { flight } else { fixed };
        Bytes { fixed: variables + fixed, flight, transient: (most - there).max(0.0) }
    };
    [of(0.0), of(inside)]
}
