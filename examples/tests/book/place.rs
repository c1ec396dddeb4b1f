//! A folder in which blocks of the book are run: with small data, the programs, and what it takes to end them.

use super::table::PLACES;
use nifti::{NiftiHeader, writer::WriterOptions};
use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The longest that a block may take.
const LIMIT: Duration = Duration::from_secs(120);

/// What stands before each script: words of the tables, and an end for whatever it has started.
const BEGINNING: &str = "\
set -euo pipefail
services=()
finish() { for s in \"${services[@]}\"; do kill -9 \"$s\" 2>/dev/null || true; done; }
trap finish EXIT
";

/// A folder, and ports for what listens in it.
pub struct Place {
    dir: TempDir,
    ports: [u16; 2],
}

impl Place {
    pub fn new() -> Place {
        // Both are free as long as they are held at once.
        let held = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let place = Place { dir: tempfile::tempdir().unwrap(), ports: held.map(|l| l.local_addr().unwrap().port()) };
        place.furnish();
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// Programs, texts, volumes.
    fn furnish(&self) {
        let [unet3d, bert] = [env!("CARGO_BIN_EXE_unet3d"), env!("CARGO_BIN_EXE_bert")];
        fs::create_dir(self.path("bin")).unwrap();
        for (name, program) in [("unet3d", unet3d.to_string()), ("bert", bert.to_string())] {
            std::os::unix::fs::symlink(program, self.path("bin").join(name)).unwrap();
        }
        // A model program is its own coordinator and worker: the same as the programs of those names.
        for name in ["coordinator", "worker"] {
            let script = self.path("bin").join(name);
            fs::write(&script, format!("#!/bin/sh\nexec {unet3d} {name} \"$@\"\n")).unwrap();
            let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            fs::set_permissions(script, executable).unwrap();
        }
        let mut words: Vec<String> = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "."].map(String::from).into();
        words.extend(('a'..='z').flat_map(|c| [c.to_string(), format!("##{c}")]));
        words.extend(["good", "bad", "film", "play", "day", "the", "was"].map(String::from));
        self.write("vocab.txt", &(words.join("\n") + "\n"));
        self.write(
            "config.json",
            "{\"model_type\": \"bert\", \"vocab_size\": 80, \"hidden_size\": 64, \"num_hidden_layers\": 4, \
             \"num_attention_heads\": 2, \"intermediate_size\": 64, \"max_position_embeddings\": 32}",
        );
        let word = |n: usize| ["good", "bad", "film", "play", "day"][n % 5];
        let sentence = |d: usize, s: usize| format!("The {} was a {} {} .", word(d * 7 + s), word(s), word(d + 2));
        let document = |d: usize| (0..6).map(|s| sentence(d, s)).collect::<Vec<_>>().join(" ");
        self.write("text.txt", &(0..40).map(document).collect::<Vec<_>>().join("\n\n"));
        self.write("sentences.txt", &(0..5).map(|d| sentence(d, d) + "\n").collect::<String>());
        let judged =
            |d: usize| format!("{}\t{}\n", sentence(d, d / 2), if d.is_multiple_of(2) { "up" } else { "down" });
        for name in ["films.tsv", "mine.tsv"] {
            self.write(name, &(0..40).map(judged).collect::<String>());
        }
        self.write("machine.toml", &mesh::machine::Machine::named("h100").unwrap().0.to_toml());
        let labels = ndarray::Array3::from_shape_fn([24, 26, 25], |(x, y, _)| u8::from(x > 9) + u8::from(y > 14));
        let image = labels.map(|l| i16::from(*l) * 100);
        let header = NiftiHeader::default();
        for (image_to, labels_to) in [("scan", "organs"), ("t1", "labels")] {
            let to = |name: &str| self.path(&format!("{name}.nii.gz"));
            WriterOptions::new(to(image_to)).reference_header(&header).write_nifti(&image).unwrap();
            WriterOptions::new(to(labels_to)).reference_header(&header).write_nifti(&labels).unwrap();
        }
    }

    /// A text with this place's addresses and folders in the place of the book's.
    pub fn here(&self, text: &str) -> String {
        let text = PLACES.iter().fold(text.to_string(), |text, (from, to, _)| text.replace(from, to));
        text.replace(":PORT", &format!(":{}", self.ports[0])).replace(":STATUS", &format!(":{}", self.ports[1]))
    }

    /// Runs lines of a script: the services among them, in the background, to its end. Gives what it printed.
    ///
    /// # Errors
    /// With what it printed, if it fails, a service of it ends by itself, or it takes too long.
    pub fn run(&self, lines: &[String]) -> Result<String, String> {
        let mut script = BEGINNING.to_string();
        for line in lines {
            match service(line) {
                Some(command) => script += &self.started(command),
                None => script += &format!("{line}\n"),
            }
        }
        // One that has ended was asked to.
        script += "for s in \"${services[@]}\"; do kill -0 \"$s\" 2>/dev/null || wait \"$s\"; done\n";
        let log = self.path("log");
        let file = File::create(&log).unwrap();
        let mut command = Command::new("bash");
        command.args(["-c", &script]).current_dir(self.dir.path()).process_group(0);
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap_or_default());
        command.env("PATH", path).env("XDG_CACHE_HOME", self.path("cache")).stdin(Stdio::null());
        command.stdout(file.try_clone().unwrap()).stderr(file);
        let mut child = command.spawn().unwrap();
        let begun = Instant::now();
        let code = loop {
            match child.try_wait().unwrap() {
                Some(status) => break status.code(),
                None if begun.elapsed() > LIMIT => break None,
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        // Whatever it has left.
        let _ = Command::new("kill").args(["-9", "--", &format!("-{}", child.id())]).stderr(Stdio::null()).status();
        let _ = child.wait();
        let printed = String::from_utf8_lossy(&fs::read(log).unwrap()).into_owned();
        match code {
            Some(0) => Ok(printed),
            Some(code) => Err(format!("code {code}\n--- the script\n{script}--- what it printed\n{printed}")),
            None => Err(format!("not done in {LIMIT:?}\n--- the script\n{script}--- what it printed\n{printed}")),
        }
    }

    /// Lines that start a service and wait until it serves.
    fn started(&self, command: &str) -> String {
        let said = if command.starts_with("coordinator") { "listening on" } else { "" };
        format!(
            "out=service-${{#services[@]}}.out; {command} >$out 2>&1 & services+=($!)\n\
             until grep -q '{said}' service-$((${{#services[@]}} - 1)).out 2>/dev/null; do\n\
             kill -0 ${{services[-1]}} || {{ cat service-*.out; exit 1; }}; sleep 0.02; done\n"
        )
    }
}

/// The command of a line that serves until it is ended: a coordinator's or a worker's, without what stands behind it.
fn service(line: &str) -> Option<&str> {
    let mut words = line.split_whitespace();
    let program = words.next().filter(|w| ["coordinator", "worker"].contains(w))?;
    let command = words.next().filter(|w| !w.starts_with(['-', '&', '#']));
    if program == "coordinator" && command.is_some() {
        return None;
    }
    let line = line.split_once(" #").map_or(line, |(line, _)| line).trim();
    Some(line.strip_suffix('&').unwrap_or(line))
}
