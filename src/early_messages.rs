//! What is printed before the log has started: without the key, which may be typed in a wrong place.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use crate::config::{self, ConfigError};
use crate::secret;

/// Prints all configuration errors of a command in one message, and gives the exit code. The log has not started yet.
pub fn misconfigured(command: Option<&str>, errors: &[ConfigError], misspelt: &[String]) -> ExitCode {
    let what = if errors.len() == 1 { "a configuration error" } else { "configuration errors" };
    let command = command.map_or_else(String::new, |name| format!(" {name}"));
    let may_pass = errors.iter().all(ConfigError::may_pass);
    let errors = errors.iter().map(ToString::to_string).chain(misspelt.iter().cloned());
    let errors: Vec<_> = errors.map(|error| format!("  {error}")).collect();
    print(&format!("{what}\n{}\nbaletheus{command} --help lists all options", errors.join("\n")));
    exit_code(may_pass)
}

/// The exit code of what cannot start: 2 is for what another start cannot mend, and systemd does not try again then.
pub fn exit_code(may_pass: bool) -> ExitCode {
    if may_pass { ExitCode::FAILURE } else { ExitCode::from(2) }
}

/// Prints a line to standard error, before the log has started. A standard error that is closed is no error.
pub fn print(text: &str) {
    let _ = writeln!(io::stderr(), "baletheus: {}", without_key(text));
}

/// A text without the key, which may be typed in a wrong place. It is in a variable, or in a file that the arguments or a
/// variable name.
pub fn without_key(text: &str) -> String {
    let files = config::key_files(std::env::args_os()).into_iter().chain(std::env::var_os("API_KEY_FILE"));
    let keys = files.filter_map(|file| secret::text_again(Path::new(&file)).ok()).chain(std::env::var("API_KEY"));
    keys.fold(text.to_owned(), |text, key| secret::without_key(&text, &key))
}
