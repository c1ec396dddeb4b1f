//! How a run keeps to the memory that its devices may use: which blocks of its program it recomputes.

use crate::report::bytes;
use crate::run::{Failed, Task};
use crate::settings::{Mistake, Settings, mistake};
use coordinator::Options;
use mesh::dim::Name;
use mesh::error::{Error, nearest};
use mesh::plan::ProgramPlan;
use mesh::plan::recompute::{Choice, Chosen};
use mesh::program::Program;
use std::str::FromStr;

/// Which blocks the backward pass makes again. That changes no bit.
#[derive(Clone, Debug, PartialEq)]
pub enum Recompute {
    /// Those with the fewest FLOPs that the memory allowed takes.
    Auto,
    /// None.
    None,
    /// These.
    Blocks(Vec<Name>),
}

impl FromStr for Recompute {
    type Err = Mistake;

    fn from_str(text: &str) -> Result<Recompute, Mistake> {
        match text.trim() {
            "auto" => Ok(Recompute::Auto),
            "none" => Ok(Recompute::None),
            list => {
                let blocks: Vec<Name> = list.split(',').map(|b| b.trim().into()).collect();
                if blocks.iter().any(|b| b.is_empty()) {
                    return mistake(
                        format!("--recompute `{list}` has a block without a name"),
                        "write `auto`, `none`, or names of blocks with commas between them",
                    );
                }
                Ok(Recompute::Blocks(blocks))
            }
        }
    }
}

/// A program, and what a run's introduction says of the blocks that it recomputes: a line, or nothing.
pub struct Fitted {
    /// The program.
    pub program: Program,
    /// The line.
    pub text: String,
}

impl<C: Settings> Task<C> {
    /// The program that `build` makes with some blocks recomputed: those that the configuration says.
    ///
    /// # Errors
    /// A program or a layout that cannot be; a block that there is not; no choice of blocks within the memory allowed.
    pub fn program(
        &self,
        options: &Options,
        build: impl Fn(&[Name]) -> Result<Program, Error>,
    ) -> Result<Fitted, Failed> {
        let build = |blocks: &[Name]| build(blocks).map(|program| program.in_chunks(self.config.common().chunks));
        let free = Options { memory: None, ..options.clone() };
        let choice = Choice { build: &build, plan: &|program| plans(program, &free) };
        let chosen = match (self.config.common().recompute.parse()?, options.memory) {
            (Recompute::Auto, Some(budget)) => choice.within(budget)?,
            (Recompute::Auto, None) | (Recompute::None, _) => {
                return Ok(Fitted { program: build(&[])?, text: String::new() });
            }
            (Recompute::Blocks(blocks), _) => {
                known(&blocks, &build(&[])?)?;
                choice.of(&blocks)?
            }
        };
        Ok(Fitted { text: text(&chosen), program: chosen.program })
    }
}

/// A plan for each stage.
pub(crate) fn plans(program: &Program, options: &Options) -> Result<Vec<ProgramPlan>, Error> {
    if program.stages.is_empty() {
        return Ok(vec![options.plan(program)?]);
    }
    let stage = |(name, _): &(Name, Vec<Name>)| {
        let stage = program.stage(name)?;
        options.of(&stage, program).plan(&stage)
    };
    program.stages.iter().map(stage).collect()
}

fn known(blocks: &[Name], program: &Program) -> Result<(), Mistake> {
    let all = program.blocks();
    let Some(block) = blocks.iter().find(|b| !all.contains(b)) else { return Ok(()) };
    let names: Vec<&str> = all.iter().map(|n| &**n).collect();
    let help = match nearest(block, names.iter().copied()) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("the blocks are {}", names.join(", ")),
    };
    mistake(format!("--recompute names the block `{block}`, which the program does not have"), help)
}

fn text(chosen: &Chosen) -> String {
    if chosen.blocks.is_empty() {
        return String::new();
    }
    let names: Vec<&str> = chosen.blocks.iter().map(|n| &**n).collect();
    let cut = match chosen.cut {
        true => format!("; there may be a cheaper choice: the search ended after {} plans", chosen.planned),
        false => String::new(),
    };
    format!(
        "memory   recomputes {}: {:.1} % more FLOPs a step, at most {} on a device instead of {}{cut}\n",
        names.join(", "),
        100.0 * chosen.more(),
        bytes(chosen.peak[0]),
        bytes(chosen.peak[1]),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_to_recompute_is_read_or_refused() {
        assert_eq!("auto".parse::<Recompute>().unwrap(), Recompute::Auto);
        assert_eq!(" none".parse::<Recompute>().unwrap(), Recompute::None);
        let two = Recompute::Blocks(vec!["encoder.0".into(), "decoder.0".into()]);
        assert_eq!("encoder.0, decoder.0".parse::<Recompute>().unwrap(), two);
        let e = "encoder.0,,".parse::<Recompute>().unwrap_err().to_string();
        assert!(e.contains("U0004") && e.contains("without a name") && e.contains("help: "), "{e}");
        assert!("".parse::<Recompute>().is_err());
    }
}
