//! `--layout auto`: a layout is searched for, and from then on is the run's like one that was given.

use crate::memory::{Recompute, plans};
use crate::report::bytes;
use crate::run::{Failed, Task};
use crate::settings::{Settings, layout_of, memory_bytes, mesh_of, mistake};
use coordinator::Options;
use mesh::dim::Name;
use mesh::error::Error;
use mesh::layout::{Layout, Mesh};
use mesh::plan::describe::seconds;
use mesh::program::Program;
use mesh::search::{Devices, Found, PLANNED, Search, Takes};

/// What a mesh or a layout is called that is to be searched for.
pub const AUTO: &str = "auto";

/// Chunks of a dimension that are tried for many devices, at the most.
const MOST_CHUNKS: usize = 64;

impl<C: Settings> Task<C> {
    /// Searches for the layout, if the configuration asks for that, by the time of `function`; sets mesh, layout and what
    /// is recomputed to what was found, and says so in some lines.
    ///
    /// # Errors
    /// No machine to search for; a program that cannot be; no layout within the memory allowed.
    pub fn search(
        &mut self,
        function: &str,
        build: impl Fn(&C, &[Name]) -> Result<Program, Error>,
    ) -> Result<String, Failed> {
        let c = self.config.common().clone();
        if c.layout.trim() != AUTO {
            return Ok(String::new());
        }
        let Some(machine) = &self.machine else {
            let help =
                "name one: `--machine h100`, or a file that `coordinator calibrate FILE.toml` has written of this one";
            return Ok(mistake("--layout auto has no machine to search for", help)?);
        };
        let devices = match (c.mesh.trim(), self.devices) {
            (AUTO, Some(n)) => Devices::Count(n),
            (AUTO, None) => {
                let what = "--mesh auto has no number of devices to make a mesh of";
                return Ok(mistake(what, "give --devices, or a machine with a number of them: `--machine h100x16`")?);
            }
            (mesh, _) => Devices::Mesh(mesh.parse()?),
        };
        let count = match &devices {
            Devices::Count(n) => *n,
            Devices::Mesh(mesh) => mesh.size(),
        };
        let (_, share) = machine.share(count);
        let memory = memory_bytes(&c.memory)?.unwrap_or((machine.memory as f64 / share) as usize);
        let (may_recompute, fixed) = match c.recompute.parse()? {
            Recompute::Auto => (true, vec![]),
            Recompute::None => (false, vec![]),
            Recompute::Blocks(blocks) => (false, blocks),
        };
        let single = {
            let common = self.config.common_mut();
            (common.mesh, common.layout) = (Mesh::single().to_string(), String::new());
            Options { memory: None, devices: None, ..self.options()? }
        };
        let planned = |program: &Program, mesh: &Mesh, layout: &Layout| {
            plans(program, &Options { mesh: mesh.clone(), layout: layout.clone(), ..single.clone() })
        };
        let usual: Mesh = match &devices {
            Devices::Count(n) => mesh_of(*n, C::AXES).parse()?,
            Devices::Mesh(mesh) => mesh.clone(),
        };
        let rules: Layout = layout_of(&usual, C::SPLITS).parse()?;
        let (config, threads, build, fixed) = (&self.config, single.threads(), &build, fixed.as_slice());
        let build = &|blocks: &[Name]| build(config, if may_recompute { blocks } else { fixed });
        // More devices than a dimension has chunks may want more of them.
        let more = count.next_power_of_two().min(MOST_CHUNKS);
        let more = (more > c.chunks && !self.chunks_given).then_some(more);
        let search = Search {
            machine,
            devices,
            memory,
            chunks: [c.chunks].into_iter().chain(more).collect(),
            may_recompute,
            function,
            threads,
            waiting: false,
            build,
            plan: &planned,
        };
        let found = search.find()?;
        let chunks = found.chunks;
        let mut text = text(&found, (chunks != c.chunks).then_some(chunks), &machine.name);
        let took = [found.searching, found.planning].map(|d| seconds(d.as_secs_f64()));
        text += &format!("         searched in {}, planned in {}\n", took[0], took[1]);
        let beside = if count > PLANNED { None } else { search.takes(chunks, fixed, &usual, &rules).ok() };
        if let Some(Takes { seconds: s, bytes: b }) = beside {
            text += &format!("         the usual layout, {rules} on {usual}, takes {} and {}\n", seconds(s), bytes(b));
        }
        let common = self.config.common_mut();
        (common.mesh, common.layout) = (found.mesh.to_string(), found.layout.to_string());
        common.chunks = chunks;
        if may_recompute && found.planned.is_some() {
            let names: Vec<&str> = found.recompute.iter().map(|n| &**n).collect();
            common.recompute = if names.is_empty() { "none".into() } else { names.join(",") };
        }
        Ok(text)
    }
}

fn text(found: &Found, chunks: Option<usize>, machine: &str) -> String {
    let blocks: Vec<&str> = found.recompute.iter().map(|n| &**n).collect();
    let mut text = format!("search   --mesh {} --layout '{}'", found.mesh, found.layout);
    if let Some(chunks) = chunks {
        text += &format!(" --chunks {chunks}");
    }
    if !blocks.is_empty() {
        text += &format!(" --recompute {}", blocks.join(","));
    }
    let takes = |t: Takes| format!("{} a step on {machine} and {} on a device", seconds(t.seconds), bytes(t.bytes));
    text += &format!("\n         {}, by the prices of the search\n", takes(found.priced));
    if let Some(planned) = found.planned {
        text += &format!("         {}, by its plan\n", takes(planned));
    }
    let gap = found.priced.seconds / found.bound - 1.0;
    let certificate = match gap < 1e-9 {
        true => "none is faster, by the prices".into(),
        false => format!("none is faster by more than {:.2} %, by the prices", 100.0 * gap),
    };
    let meshes = if found.meshes == 1 { "1 mesh".into() } else { format!("{} meshes", found.meshes) };
    text + &format!("         of {:.1e} layouts on {meshes}, {} planned: {certificate}\n", found.layouts, found.plans)
}
