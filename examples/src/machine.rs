//! The machine that a command line names.

use crate::run::Failed;
use crate::settings::mistake;
use mesh::error::Error;
use mesh::machine::Machine;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The longest description of a machine that is read; `Machine::from_toml` refuses one that is longer than it takes.
const MACHINE_BYTES: u64 = 1 << 20;

/// A machine by its name, with a number of devices (`h100x16`), or from a file.
///
/// # Errors
/// A machine that there is not, a file that describes none.
pub(crate) fn named(text: &str) -> Result<(Machine, Option<usize>), Failed> {
    match text.ends_with(".toml") {
        true => Ok((described(Path::new(text))?, None)),
        false => Ok(Machine::named(text)?),
    }
}

/// A machine from a file.
fn described(path: &Path) -> Result<Machine, Failed> {
    let text = read(path, MACHINE_BYTES).or_else(|why| {
        let help = "name a file that `coordinator calibrate` has written, or a machine such as `h100x16`";
        mistake(format!("--machine {} cannot be read: {why}", path.display()), help)
    })?;
    Ok(Machine::from_toml(&text).map_err(|e: Error| e.note(format!("in the file `{}`", path.display())))?)
}

/// The text of a file, of so many bytes at the most: what follows is left out.
pub(crate) fn read(path: &Path, most: u64) -> std::io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(most).read_to_string(&mut text)?;
    Ok(text)
}
