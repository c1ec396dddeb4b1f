//! Communication beside computation: collectives that begin and finish in steps of their own.
//!
//! A collective may begin right behind what it sends and finish right before what reads it, and what stands between is done
//! while its messages are on their way. The list stays one for all devices: what one of them waits for, others have begun
//! earlier in it, so nobody can wait for one who waits for him, and messages between a pair keep one order.
//!
//! A convolution that reads a halo is taken apart too: what needs nothing of the halo, its interior, is computed while that is
//! on its way, and then the rim.
//!
//! All collectives are taken apart first, and then moments are moved: the end of each down to its first reader, the combination
//! of a sum half of that way; a beginning up, with what is cheap and only made for it, where there is not enough in between (so
//! weights are gathered while the layer before is computed); and independent products in between. A move is made only if no
//! device then holds more than its peak was before. Places are looked for within what it took before, and where there are none,
//! moves leave some of the peak free. What stays in one piece is one step.
//!
//! There is no machine here: costs are in FLOPs of a usual one, and decide only how far is far enough.

mod graph;
mod list;
mod rim;

use super::device::{Place, Worked};
use super::function::Planner;
use super::timeline::Timeline;
use list::List;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

/// What is done of a group at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// All of it.
    Whole,
    /// Posts what is sent and received.
    Begin,
    /// Waits for the parts of a sum, combines them, and sends the results on.
    Combine,
    /// Waits for the rest.
    Finish,
    /// Of a convolution, computes what needs nothing of a halo that is on its way.
    Interior,
    /// Computes the rest of it.
    Rim,
}

/// A step of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Moment {
    /// The group.
    pub group: usize,
    /// What is done of it.
    pub phase: Phase,
}

/// Shares of the peak that are left free, tried in turn: with little room, not everything finds a place.
const MARGINS: [f64; 5] = [0.0, 1.0 / 64.0, 1.0 / 16.0, 1.0 / 4.0, 1.0];

/// By group that is taken apart: which of those under way at a time it is.
pub(super) fn numbers(moments: &[Moment]) -> HashMap<usize, usize> {
    let mut last = HashMap::new();
    moments.iter().enumerate().for_each(|(m, moment)| {
        last.insert(moment.group, m);
    });
    let (mut out, mut free, mut next) = (HashMap::new(), BTreeSet::new(), 0);
    let apart = |m: &Moment| matches!(m.phase, Phase::Begin | Phase::Combine | Phase::Finish);
    for (m, moment) in moments.iter().enumerate().filter(|(_, m)| apart(m)) {
        let number = *out.entry(moment.group).or_insert_with(|| {
            free.pop_first().unwrap_or_else(|| {
                next += 1;
                next - 1
            })
        });
        if last[&moment.group] == m {
            free.insert(number);
        }
    }
    out
}

impl Planner<'_> {
    /// Takes collectives apart where that takes no memory beyond what there is without, and says where everything lies
    /// then ([`Planner::places`]), and by device its timeline without.
    pub(super) fn overlap(&mut self, works: &[Vec<Worked>]) -> (Vec<usize>, Vec<Place>, Vec<Option<Arc<Timeline>>>) {
        let whole = self.places(works, None);
        let none = vec![None; self.devices()];
        let apart = (0..self.groups().len()).any(|g| self.phases(g).is_some());
        if self.cx.waiting || !apart {
            return (whole.0, whole.1, none);
        }
        let first = self.moments.clone();
        let ends = |(of, places): &(Vec<usize>, Vec<Place>)| of.iter().map(|c| places[*c].end).collect::<Vec<_>>();
        let before = ends(&whole);
        let blocks = self.blocks();
        let timelines: Vec<_> = whole.1.iter().map(|place| Arc::new(self.timeline_of(place, &blocks))).collect();
        let mut tried: Option<Vec<Moment>> = None;
        let list = List::new(self, works);
        for margin in MARGINS {
            let moments = list.clone().moved(margin);
            if moments == first || tried.as_ref() == Some(&moments) {
                continue;
            }
            self.schedule(moments.clone());
            let places = self.places(works, Some(&before));
            if ends(&places).iter().zip(&before).all(|(now, before)| now <= before) {
                let waiting = whole.0.iter().map(|c| Some(timelines[*c].clone())).collect();
                return (places.0, places.1, waiting);
            }
            tried = Some(moments);
        }
        self.schedule(first);
        (whole.0, whole.1, none)
    }
}
