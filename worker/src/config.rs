//! Options from a file: `--config FILE.toml`, in which every option of a command is a key of the same name.
//!
//! A file's values become the options' defaults, so that the environment and the command line win over them.

use clap::error::{ContextKind, ContextValue};
use clap::{Arg, ArgAction, Command, CommandFactory, FromArgMatches};
use mesh::error::nearest;
use std::ffi::OsString;
use std::io::Read;
use std::path::Path;
use toml::de::{DeTable, DeValue};

/// The longest configuration file.
const FILE_BYTES: u64 = 1 << 20;

/// What is wrong with a configuration file.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file that cannot be read, or is no TOML.
    #[error("W0060: cannot read the configuration: {why}\n  --> {place}")]
    File {
        /// The file, and the line.
        place: String,
        /// Why.
        why: String,
    },
    /// A key that there is not.
    #[error("W0061: there is no key `{key}`\n  --> {place}\n  help: {help}")]
    UnknownKey {
        /// The key.
        key: String,
        /// File and line.
        place: String,
        /// The nearest key, or all of them.
        help: String,
    },
    /// A value that a key cannot have.
    #[error("W0062: `{key}` cannot be {value}: {why}\n  --> {place}")]
    Value {
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// Why.
        why: String,
        /// File and line.
        place: String,
    },
}

/// Why a command line does not become options.
pub enum ParseError {
    /// The command line itself; prints itself, and is help as well.
    CommandLine(clap::Error),
    /// The file.
    File(ConfigError),
}

/// Reads a command line, whose first word is the program's name, with the file that it names.
///
/// # Errors
/// Options or a file that are wrong, or help that was asked for.
pub fn parse<T: CommandFactory + FromArgMatches>(args: &[OsString]) -> Result<T, ParseError> {
    let mut command = T::command();
    if let Some(path) = file(args) {
        command = with_file(command, Path::new(path)).map_err(ParseError::File)?;
    }
    let matches = command.clone().try_get_matches_from(args).map_err(ParseError::CommandLine)?;
    T::from_arg_matches(&matches).map_err(|e| ParseError::CommandLine(e.format(&mut command)))
}

/// The file that `--config` names.
fn file(args: &[OsString]) -> Option<&std::ffi::OsStr> {
    let options = args.iter().take_while(|a| *a != "--");
    options.enumerate().find_map(|(i, a)| match a.to_str()?.strip_prefix("--config")? {
        "" => args.get(i + 1).map(OsString::as_os_str),
        rest => rest.strip_prefix('=').map(std::ffi::OsStr::new),
    })
}

fn with_file(command: Command, path: &Path) -> Result<Command, ConfigError> {
    let wrong = |place: String, why: String| ConfigError::File { place, why };
    let read = std::fs::File::open(path).and_then(|f| {
        let mut text = String::new();
        f.take(FILE_BYTES).read_to_string(&mut text).map(|_| text)
    });
    let text = read.map_err(|e| wrong(path.display().to_string(), e.to_string()))?;
    let place = |at: usize| {
        let line = text.get(..at).unwrap_or_default().matches('\n').count() + 1;
        format!("{}:{line}", path.display())
    };
    let table = DeTable::parse(&text)
        .map_err(|e| wrong(place(e.span().map_or(0, |s| s.start)), format!("it is no TOML: {}", e.message())))?;
    let mut command = command;
    for (key, value) in table.get_ref() {
        let at = place(key.span().start);
        command = with_key(command, key.get_ref(), value.get_ref(), at)?;
    }
    Ok(command)
}

/// Makes a value the default of the option of that name.
fn with_key(command: Command, key: &str, value: &DeValue<'_>, place: String) -> Result<Command, ConfigError> {
    let is_key = |a: &&Arg| !matches!(a.get_long(), None | Some("config" | "help" | "version"));
    let keys: Vec<&str> = command.get_arguments().filter(is_key).filter_map(Arg::get_long).collect();
    let Some(option) = command.get_arguments().filter(is_key).find(|a| a.get_long() == Some(key)) else {
        let near = nearest(key, keys.iter().copied());
        let help = near.map_or(format!("the keys are {}", keys.join(", ")), |n| format!("did you mean `{n}`?"));
        return Err(ConfigError::UnknownKey { key: key.into(), place, help });
    };
    let flag = matches!(option.get_action(), ArgAction::SetTrue);
    let (text, fits) = match value {
        DeValue::String(s) => (s.to_string(), !flag),
        DeValue::Integer(i) => (i.to_string(), !flag),
        DeValue::Float(f) => (f.to_string(), !flag),
        DeValue::Boolean(b) => (b.to_string(), flag),
        DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => ("a list or table".into(), false),
    };
    let wrong = |why: String| ConfigError::Value { key: key.into(), value: text.clone(), why, place: place.clone() };
    if !fits {
        return Err(wrong(if flag { "it is true or false" } else { "it is a text or a number" }.into()));
    }
    if !flag {
        // What the option says to it, apart from all others.
        let alone = Command::new("file").no_binary_name(true).arg(option.clone().required(false).env(None::<&str>));
        alone.try_get_matches_from([format!("--{key}={text}")]).map_err(|e| wrong(reason(&e)))?;
    }
    let id = option.get_id().clone();
    Ok(command.mut_arg(id, |a| a.required(false).default_value(text)))
}

/// What an option says to a value, in words.
fn reason(e: &clap::Error) -> String {
    let source = std::error::Error::source(e).map(ToString::to_string);
    let choices = e.get(ContextKind::ValidValue).map(|v| match v {
        ContextValue::Strings(all) => format!("it is one of {}", all.join(", ")),
        other => format!("it is {other}"),
    });
    source.or(choices).unwrap_or_else(|| e.kind().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser, Debug)]
    struct Options {
        #[arg(long)]
        join: String,
        #[arg(long, env = "MESH_TEST_CONFIG_WAIT", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=100))]
        wait: u64,
        #[arg(long)]
        insecure: bool,
        #[arg(long, value_parser = ["text", "json"], default_value = "text")]
        log_format: String,
        #[arg(long, value_name = "FILE")]
        config: Option<std::path::PathBuf>,
    }

    fn read(text: &str, more: &str) -> Result<Options, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let args = format!("program --config {} {more}", file.path().display());
        let args: Vec<OsString> = args.split_whitespace().map(OsString::from).collect();
        parse(&args).map_err(|e| match e {
            ParseError::CommandLine(e) => e.to_string(),
            ParseError::File(e) => e.to_string().replace(&file.path().display().to_string(), "FILE"),
        })
    }

    #[test]
    fn a_file_gives_options_and_the_command_line_wins_over_it() {
        let text = "# a comment\njoin = \"host:1\"\nwait = 7\ninsecure = true\nlog-format = \"json\"\n";
        let o = read(text, "").unwrap();
        assert_eq!((&*o.join, o.wait, o.insecure, &*o.log_format), ("host:1", 7, true, "json"));
        assert!(o.config.is_some());
        let o = read(text, "--wait 9 --join=other:2").unwrap();
        assert_eq!((&*o.join, o.wait), ("other:2", 9));
        assert_eq!(read("", "--join a:1").unwrap().wait, 60);
        assert!(read("", "").unwrap_err().contains("--join"), "what is required stays so");
    }

    #[test]
    fn the_environment_wins_over_a_file() {
        // SAFETY: no other test reads or writes this variable.
        unsafe { std::env::set_var("MESH_TEST_CONFIG_WAIT", "8") };
        assert_eq!(read("join = \"a\"\nlog-format = \"json\"", "").unwrap().wait, 8);
        // SAFETY: as above.
        unsafe { std::env::remove_var("MESH_TEST_CONFIG_WAIT") };
    }

    #[test]
    fn mistakes_in_a_file_name_the_line_and_what_to_do() {
        for (text, expected) in [
            ("join = \"a\"\n\nwiat = 3\n", "W0061: there is no key `wiat`\n  --> FILE:3\n  help: did you mean `wait`?"),
            ("log_format = \"json\"", "help: did you mean `log-format`?"),
            ("config = \"x\"", "W0061: there is no key `config`\n  --> FILE:1\n  help: the keys are join, wait,"),
            ("join = \"a\"\nwait = 0", "W0062: `wait` cannot be 0: 0 is not in 1..=100\n  --> FILE:2"),
            ("wait = \"long\"", "W0062: `wait` cannot be long: invalid digit found in string\n  --> FILE:1"),
            ("log-format = \"xml\"", "W0062: `log-format` cannot be xml: it is one of text, json\n  --> FILE:1"),
            ("insecure = 1", "`insecure` cannot be 1: it is true or false"),
            ("join = true", "`join` cannot be true: it is a text or a number"),
            ("join = [1]", "`join` cannot be a list or table: it is a text or a number"),
            ("wait = 7\nwait", "W0060: cannot read the configuration: it is no TOML: "),
        ] {
            let e = read(text, "--join b").unwrap_err();
            assert!(e.contains(expected), "{text}:\n{e}");
        }
    }
}
