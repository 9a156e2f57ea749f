//! Flags and variables: which one wins, and what is wrong with its value.

use std::ffi::OsString;

use clap::ArgMatches;
use clap::parser::ValueSource;

use super::options::{Verb, option};
use crate::values::is_quoted;

/// The beginning of variables that balena reserves: a fleet cannot set them, and the supervisor may.
const RESERVED: &str = "BALENA_";

/// The flags and variables of a command, and the errors that they have so far.
pub struct Sources<'a> {
    /// The command.
    pub verb: Verb,
    /// What clap read.
    pub matches: &'a ArgMatches,
    /// The environment.
    pub var: &'a dyn Fn(&str) -> Option<OsString>,
    /// One line each, for the user.
    pub errors: Vec<String>,
}

impl Sources<'_> {
    /// Where an option is given, and its values. An empty value counts as not given.
    pub fn given(&mut self, name: &str) -> Option<(String, Vec<String>)> {
        let opt = option(self.verb, name);
        if !opt.flag.is_empty() && self.matches.value_source(opt.flag) == Some(ValueSource::CommandLine) {
            let values = self.matches.get_many::<String>(opt.flag).into_iter().flatten();
            let values: Vec<_> = values.filter(|value| !value.is_empty()).cloned().collect();
            let source = format!("--{}", opt.flag);
            if !self.are_bare(&source, &values) || values.is_empty() {
                return None;
            }
            return Some((source, values));
        }
        let set: Vec<_> = opt.vars.iter().filter_map(|name| Some((*name, (self.var)(name)?))).collect();
        let mut set = set.into_iter().filter(|(_, value)| !value.is_empty());
        let (name, value) = set.next()?;
        let differs = |(name, other): &(&str, _)| *other != value && !name.starts_with(RESERVED);
        if let Some((other, _)) = set.find(differs) {
            self.errors.push(format!("{name} and {other} are set to different values: set one of them"));
        }
        let value = value.into_string().map_err(|_| self.errors.push(format!("{name} is not UTF-8")));
        let values = vec![value.ok()?];
        self.are_bare(name, &values).then(|| (name.into(), values))
    }

    /// Whether no value has quotes around it. Docker's `--env-file` and balena's dashboard keep them, unlike a shell.
    fn are_bare(&mut self, source: &str, values: &[String]) -> bool {
        let is_bare = !values.iter().any(|value| is_quoted(value));
        if !is_bare {
            self.errors.push(format!("{source} has quotes around its value, and they are part of it: remove them"));
        }
        is_bare
    }

    /// The values of an option without a default.
    pub fn all<T>(&mut self, name: &str, read: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        let Some((source, values)) = self.given(name) else { return Vec::new() };
        let mut read_or_report = |text: &String| {
            let report = |error| {
                // A URL may contain a password or a key.
                let is_secret = text.contains("://") && text.contains(['@', '?']);
                let shown = if is_secret { "not shown".into() } else { format!("{text:?}") };
                self.errors.push(format!("{source} is {shown}: {error}; it takes: {}", option(self.verb, name).help));
            };
            read(text).map_err(report).ok()
        };
        values.iter().filter_map(&mut read_or_report).collect()
    }

    /// The items of an option whose values are lists.
    pub fn list<T>(&mut self, name: &str, read: impl Fn(&str) -> Result<Vec<T>, String>) -> Vec<T> {
        let list: Vec<T> = self.all(name, &read).into_iter().flatten().collect();
        if list.is_empty() { read(option(self.verb, name).default).unwrap_or_default() } else { list }
    }

    /// The value of an option with a default. The default also replaces a value that cannot be read.
    ///
    /// # Panics
    /// The default cannot be read: a mistake in the table.
    pub fn one<T>(&mut self, name: &str, read: impl Fn(&str) -> Result<T, String>) -> T {
        self.all(name, &read)
            .pop()
            .unwrap_or_else(|| read(option(self.verb, name).default).expect("defaults can be read"))
    }
}
