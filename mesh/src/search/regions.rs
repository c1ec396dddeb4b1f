//! What nodes have and need of tensors, each once: the same few regions lie behind all ways to split a segment, so that
//! hardly any of them has to be made.

use super::split::Splits;
use crate::hash::Quick;
use crate::region::Region;
use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::rc::Rc;

/// What a node needs of an input.
#[derive(Clone, PartialEq, Eq)]
pub struct Wanted {
    /// What of it the device needs.
    pub region: Rc<Region>,
    /// Over which axes the dimensions of that are split, as far as the node has them too.
    pub split: Splits,
    /// Whether what the device does not have is read where it comes.
    pub apart: bool,
}

impl Hash for Wanted {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // Of regions alike there is one.
        Rc::as_ptr(&self.region).hash(state);
        self.split.hash(state);
        self.apart.hash(state);
    }
}

/// A region by its ranges: names hardly tell any apart.
#[derive(PartialEq, Eq)]
struct Ranges(Region);

impl Hash for Ranges {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.0.iter().for_each(|(_, range)| range.hash(state));
    }
}

impl Wanted {
    /// Whether devices along some axis need other parts along another dimension than they hold.
    pub fn crosses(&self, held: Splits) -> bool {
        let dims = 0..self.region.0.len();
        let others = |d: usize| dims.clone().filter(|e| *e != d).fold(0, |all, e| all | self.split.of(e));
        held.0 != 0 && self.split.0 != 0 && dims.clone().any(|d| held.of(d) & others(d) != 0)
    }
}

/// Regions, and what is needed, by number.
#[derive(Default)]
pub struct Regions {
    known: HashMap<Ranges, Rc<Region>, Quick>,
    wanted: Vec<Wanted>,
    numbers: HashMap<Wanted, usize, Quick>,
}

impl Regions {
    /// The one region that is equal to this one.
    pub fn one(&mut self, region: Region) -> Rc<Region> {
        let region = Ranges(region);
        if let Some(known) = self.known.get(&region) {
            return known.clone();
        }
        let one = Rc::new(region.0.clone());
        self.known.insert(region, one.clone());
        one
    }

    /// The number of what is needed.
    pub fn number(&mut self, wanted: Wanted) -> usize {
        if let Some(number) = self.numbers.get(&wanted) {
            return *number;
        }
        self.wanted.push(wanted.clone());
        self.numbers.insert(wanted, self.wanted.len() - 1);
        self.wanted.len() - 1
    }

    /// What is needed, by its number.
    pub fn wanted(&self, number: usize) -> &Wanted {
        &self.wanted[number]
    }
}
