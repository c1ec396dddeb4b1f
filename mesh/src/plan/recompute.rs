//! Which blocks a backward pass makes again, so that a program keeps to a budget of memory.
//!
//! Peaks do not add up over blocks, so a choice of blocks is judged by its plan, and nothing else says that it fits.
//! Choices are tried from the cheapest one on: the first that fits is the best. A plan rules out others without planning
//! them: what is alive at one of its steps, less all that is inside further blocks there and less what is only kept because
//! there is room ([`crate::spmd`]), is a lower bound of the peak of every choice with those blocks in addition.

use super::ProgramPlan;
use super::describe::bytes;
use crate::dim::Name;
use crate::error::Error;
use crate::program::{Block, Program};
use std::collections::BTreeMap;

/// Candidates at the most: of more blocks, neighbours are chosen together.
pub const CANDIDATES: usize = 14;
/// Choices that are planned at the most before the search is cut off; where none of them fits, as many again for the least
/// peak.
pub const PLANS: usize = 128;

/// A choice of blocks, and what it takes.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// The blocks that are made again, in the order of the program.
    pub blocks: Vec<Name>,
    /// The program that makes them again.
    pub program: Program,
    /// FLOPs of one run of each function with a backward pass, and what they are without recomputation.
    pub flops: [u64; 2],
    /// Highest peak of a device in bytes, and what it is without recomputation.
    pub peak: [usize; 2],
    /// Choices that were planned.
    pub planned: usize,
    /// Whether the search was cut off, so that there may be a cheaper one.
    pub cut: bool,
}

impl Chosen {
    /// More FLOPs than without recomputation, as a share of those.
    pub fn more(&self) -> f64 {
        let [with, without] = self.flops.map(|f| f as f64);
        if without > 0.0 { with / without - 1.0 } else { 0.0 }
    }
}

/// What a choice is made of: how the program is built with some blocks made again, and how it is planned, without a
/// limit of memory; a plan for each of its stages.
pub struct Choice<'a> {
    /// Builds.
    pub build: &'a dyn Fn(&[Name]) -> Result<Program, Error>,
    /// Plans.
    pub plan: &'a dyn Fn(&Program) -> Result<Vec<ProgramPlan>, Error>,
}

impl Choice<'_> {
    /// The cheapest choice whose planned peak is within the budget on every device. The cost of a choice is the sum of
    /// its blocks' costs, and a block's cost is by how many FLOPs ([`Function::flops`]) it alone raises one run of the
    /// functions with a backward pass; of equally expensive choices it is one with the fewest blocks.
    ///
    /// The peak is always the plan's. That nothing cheaper fits holds as far as making a block again takes nothing from
    /// what a plan holds at a step but that block's own values, on which the lower bounds rest. Beyond [`CANDIDATES`]
    /// blocks, neighbours are chosen together. Beyond [`PLANS`] plans the search is cut off: then the choice fits, and
    /// no block of it can be left out, but there may be cheaper ones.
    ///
    /// # Errors
    /// What is wrong with program or layout. `M0001` if no choice fits, with the least peak that one reaches (of those
    /// that were planned, where the search was cut off).
    ///
    /// [`Function::flops`]: crate::program::Function::flops
    pub fn within(&self, budget: usize) -> Result<Chosen, Error> {
        let without = (self.build)(&[])?;
        let mut search = Search::new(self, &without)?;
        let found = search.cheapest(budget)?;
        let choice = match found {
            Some(choice) => choice,
            None => {
                let least = search.least(budget)?;
                if search.peak(least)? > budget {
                    return Err(search.over(least, budget)?);
                }
                search.needed(least, budget)?
            }
        };
        let blocks = search.names(choice);
        let program = (self.build)(&blocks)?;
        let flops = [trained_flops(&program), trained_flops(&without)];
        let peak = [search.peak(choice)?, search.peak(0)?];
        Ok(Chosen { blocks, program, flops, peak, planned: search.tried.len(), cut: found.is_none() })
    }

    /// A choice made by hand.
    ///
    /// # Errors
    /// What is wrong with program or layout.
    pub fn of(&self, blocks: &[Name]) -> Result<Chosen, Error> {
        let (program, without) = ((self.build)(blocks)?, (self.build)(&[])?);
        let peak = [highest(&(self.plan)(&program)?), highest(&(self.plan)(&without)?)];
        let flops = [trained_flops(&program), trained_flops(&without)];
        Ok(Chosen { blocks: blocks.to_vec(), program, flops, peak, planned: 2, cut: false })
    }
}

/// FLOPs of one run of each function that has a backward pass.
fn trained_flops(program: &Program) -> u64 {
    program.functions.values().filter(|f| !f.blocks.is_empty()).map(|f| f.flops()).sum()
}

/// The highest peak of a device in some plans.
fn highest(plans: &[ProgramPlan]) -> usize {
    plans.iter().flat_map(|p| (0..p.mesh.size()).map(|d| p.peak_bytes(d))).max().unwrap_or(0)
}

/// Some of the candidates, a bit each.
type Mask = u32;

/// A choice that was planned.
struct Tried {
    mask: Mask,
    peak: usize,
    /// What is alive and has to be, workspaces included, at a step, by how much of that is inside of each candidate.
    alive: BTreeMap<Vec<usize>, usize>,
}

impl Tried {
    /// A lower bound of the peak of a choice.
    fn floor(&self, mask: Mask) -> usize {
        if mask & self.mask != self.mask {
            return 0;
        }
        let more = mask & !self.mask;
        let gone = |inside: &[usize]| {
            let chosen = inside.iter().enumerate().filter(|(i, _)| more >> i & 1 == 1);
            chosen.map(|(_, b)| b).sum::<usize>()
        };
        self.alive.iter().map(|(inside, alive)| alive - gone(inside)).max().unwrap_or(0)
    }
}

struct Search<'a> {
    choice: &'a Choice<'a>,
    /// Blocks that are chosen together.
    candidates: Vec<Vec<Name>>,
    /// All choices, from the cheapest one on.
    all: Vec<Mask>,
    cost: Vec<u64>,
    tried: Vec<Tried>,
}

impl<'a> Search<'a> {
    fn new(choice: &'a Choice<'a>, without: &Program) -> Result<Search<'a>, Error> {
        let blocks = without.blocks();
        let together = blocks.len().div_ceil(CANDIDATES).max(1);
        let candidates: Vec<Vec<Name>> = blocks.chunks(together).map(<[Name]>::to_vec).collect();
        let flops = trained_flops(without);
        let mut cost = vec![];
        for blocks in &candidates {
            cost.push(trained_flops(&(choice.build)(blocks)?).saturating_sub(flops));
        }
        let of = |mask: Mask| cost.iter().enumerate().filter(|(i, _)| mask >> i & 1 == 1).map(|(_, c)| c).sum::<u64>();
        let mut all: Vec<Mask> = (0..1 << candidates.len()).collect();
        all.sort_by_cached_key(|m| (of(*m), m.count_ones(), *m));
        Ok(Search { choice, candidates, all, cost, tried: vec![] })
    }

    fn names(&self, mask: Mask) -> Vec<Name> {
        let chosen = self.candidates.iter().enumerate().filter(|(i, _)| mask >> i & 1 == 1);
        chosen.flat_map(|(_, blocks)| blocks.iter().cloned()).collect()
    }

    /// The peak of a choice.
    fn peak(&mut self, mask: Mask) -> Result<usize, Error> {
        if let Some(tried) = self.tried.iter().find(|t| t.mask == mask) {
            return Ok(tried.peak);
        }
        let program = (self.choice.build)(&self.names(mask))?;
        let plans = (self.choice.plan)(&program)?;
        let mut alive = BTreeMap::new();
        for plan in &plans {
            for (name, devices) in &plan.timelines {
                // By block of the function: the candidate that it is of.
                let blocks = program.functions.get(name).map_or(&[][..], |f| &f.blocks);
                let candidate = |b: &Block| self.candidates.iter().position(|c| c.contains(&b.name));
                let of: Vec<Option<usize>> = blocks.iter().map(candidate).collect();
                for timeline in devices.iter().map(|t| t.waiting()) {
                    for (step, now) in timeline.alive.iter().enumerate() {
                        let mut inside = vec![0; self.candidates.len()];
                        for (bytes, at) in timeline.inside.iter().zip(&of) {
                            at.iter().for_each(|&at| inside[at] += bytes[step]);
                        }
                        let most = alive.entry(inside).or_insert(0);
                        *most = (now - timeline.kept[step] + plan.workspace_bytes).max(*most);
                    }
                }
            }
        }
        let tried = Tried { mask, peak: highest(&plans), alive };
        let peak = tried.peak;
        self.tried.push(tried);
        Ok(peak)
    }

    fn floor(&self, mask: Mask) -> usize {
        self.tried.iter().map(|t| t.floor(mask)).max().unwrap_or(0)
    }

    /// The cheapest choice that fits; None if there is none, or if the search is cut off.
    fn cheapest(&mut self, budget: usize) -> Result<Option<Mask>, Error> {
        for i in 0..self.all.len() {
            let mask = self.all[i];
            if self.floor(mask) <= budget && self.tried.len() < PLANS && self.peak(mask)? <= budget {
                return Ok(Some(mask));
            }
        }
        Ok(None)
    }

    /// The choice with the least peak, or one that fits. Those with the most blocks are the likeliest.
    fn least(&mut self, budget: usize) -> Result<Mask, Error> {
        let least = |tried: &[Tried]| tried.iter().map(|t| (t.peak, t.mask)).min().unwrap_or((usize::MAX, 0));
        let most = self.tried.len() + PLANS;
        for i in (0..self.all.len()).rev() {
            let (mask, (peak, _)) = (self.all[i], least(&self.tried));
            if peak > budget && self.floor(mask) < peak && self.tried.len() < most {
                self.peak(mask)?;
            }
        }
        Ok(least(&self.tried).1)
    }

    /// Of a choice that fits, the part without which it would not: less the most expensive ones that can be left out.
    fn needed(&mut self, mut mask: Mask, budget: usize) -> Result<Mask, Error> {
        let mut order: Vec<usize> = (0..self.candidates.len()).filter(|i| mask >> i & 1 == 1).collect();
        order.sort_by_key(|&i| std::cmp::Reverse(self.cost[i]));
        for i in order {
            let less = mask & !(1 << i);
            if self.floor(less) <= budget && self.peak(less)? <= budget {
                mask = less;
            }
        }
        Ok(mask)
    }

    /// That no choice fits: what the one with the least peak would need.
    fn over(&mut self, least: Mask, budget: usize) -> Result<Error, Error> {
        let names = self.names(least);
        let plans = (self.choice.plan)(&(self.choice.build)(&names)?)?;
        let errors =
            plans.iter().filter_map(|p| Some((highest(std::slice::from_ref(p)), p.check_memory(budget).err()?)));
        let Some((_, e)) = errors.max_by_key(|(peak, _)| *peak) else {
            unreachable!("this choice was planned before, and was over the budget")
        };
        if self.candidates.is_empty() {
            return Ok(e);
        }
        let names: Vec<&str> = names.iter().map(|n| &**n).collect();
        let how = if names.is_empty() {
            "this is with none".to_string()
        } else {
            format!("this is with {}", names.join(", "))
        };
        let peak = self.peak(least)?;
        let open = |mask: &&Mask| self.floor(**mask) < peak && self.tried.iter().all(|t| t.mask != **mask);
        let of = match self.all.iter().find(open) {
            None => "no choice of blocks to recompute needs less".into(),
            Some(_) => {
                format!("of {} choices of blocks to recompute that were planned, none needs less", self.tried.len())
            }
        };
        Ok(e.note(format!("{of}; {how}; with none it is {}", bytes(self.peak(0)?))))
    }
}
