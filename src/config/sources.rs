//! Flags and variables: which one wins, and what is wrong with its value.

use std::ffi::{OsStr, OsString};

use clap::ArgMatches;
use clap::parser::ValueSource;

use super::error::ConfigError;
use super::options::{Verb, option};
use crate::values::{BadValue, is_quoted, items};

/// The beginning of variables that balena reserves: a fleet cannot set them, and the supervisor may.
const RESERVED: &str = "BALENA_";

/// The flags and variables of a command, and the errors that they have so far.
pub struct Sources<'a> {
    pub verb: Verb,
    pub matches: &'a ArgMatches,
    pub var: &'a dyn Fn(&str) -> Option<OsString>,
    /// The mistakes so far, each once.
    pub errors: Vec<ConfigError>,
    /// What is allowed but looks like a mistake.
    pub warnings: Vec<String>,
}

impl Sources<'_> {
    /// Where an option is given, and its values, without the white space around them. A variable without any character counts as
    /// not given. Other values without content are mistakes: a fleet of no name would select every device.
    pub fn given(&mut self, name: &str) -> Option<(String, Vec<String>)> {
        let opt = option(self.verb, name);
        if !opt.flag.is_empty() && self.matches.value_source(opt.flag) == Some(ValueSource::CommandLine) {
            let values = self.matches.get_many::<String>(opt.flag).into_iter().flatten();
            let values = values.map(|value| value.trim().to_owned()).collect();
            return self.checked(name, format!("--{}", opt.flag), values);
        }
        if opt.negative().is_some_and(|name| self.matches.get_flag(name)) {
            return Some((format!("--no-{}", opt.flag), vec!["false".to_owned()]));
        }
        let set: Vec<_> = opt.vars.iter().filter_map(|name| Some((*name, (self.var)(name)?))).collect();
        let mut set = set.into_iter().filter(|(_, value)| !value.is_empty());
        let (variable, value) = set.next()?;
        let differs =
            |(name, other): &(&str, OsString)| trimmed(other) != trimmed(&value) && !name.starts_with(RESERVED);
        if let Some((other, _)) = set.find(differs) {
            self.report(ConfigError::Different { given: variable, other });
        }
        let Some(value) = value.to_str() else {
            self.report(ConfigError::NotUtf8 { given: variable });
            return None;
        };
        self.checked(name, variable.into(), vec![value.trim().to_owned()])
    }

    /// The same source and values, if each value has content and no quotes around it. Docker's `--env-file` and balena's
    /// dashboard keep quotes, unlike a shell.
    fn checked(&mut self, name: &str, source: String, values: Vec<String>) -> Option<(String, Vec<String>)> {
        if values.iter().any(|value| is_quoted(value)) {
            self.report(ConfigError::Quotes { given: source });
            return None;
        }
        if let Some(value) = values.iter().find(|value| items(value).next().is_none()) {
            self.report_value(name, &source, value, "it has no value; set one, or leave it out".into());
            return None;
        }
        Some((source, values))
    }

    /// The values of an option without a default.
    pub fn all<T>(&mut self, name: &str, read: impl Fn(&str) -> Result<T, BadValue>) -> Vec<T> {
        let Some((source, values)) = self.given(name) else { return Vec::new() };
        let mut read_or_report =
            |text: &String| read(text).map_err(|why| self.report_value(name, &source, text, why)).ok();
        values.iter().filter_map(&mut read_or_report).collect()
    }

    /// Adds a mistake, unless it is known: an option may be looked at twice.
    pub fn report(&mut self, error: ConfigError) {
        let text = error.to_string();
        if !self.errors.iter().any(|known| known.to_string() == text) {
            self.errors.push(error);
        }
    }

    /// Adds the mistake of a value.
    pub fn report_value(&mut self, name: &str, source: &str, text: &str, why: BadValue) {
        // A URL may contain a password or a key, and may lack its scheme by mistake.
        let is_secret = text.contains(':') && (text.contains('@') || text.contains("://") && text.contains('?'));
        let value = if is_secret { "not shown".into() } else { format!("{text:?}") };
        let takes = option(self.verb, name).takes;
        self.report(ConfigError::Value { given: source.into(), value, why, takes });
    }

    /// The items of an option whose values are lists.
    pub fn list<T>(&mut self, name: &str, read: impl Fn(&str) -> Result<Vec<T>, BadValue>) -> Vec<T> {
        let list: Vec<T> = self.all(name, &read).into_iter().flatten().collect();
        if list.is_empty() { read(option(self.verb, name).default).unwrap_or_default() } else { list }
    }

    /// The value of an option with a default. The default also replaces a value that cannot be read.
    ///
    /// # Panics
    /// The default cannot be read: a mistake in the table.
    pub fn one<T>(&mut self, name: &str, read: impl Fn(&str) -> Result<T, BadValue>) -> T {
        self.all(name, &read)
            .pop()
            .unwrap_or_else(|| read(option(self.verb, name).default).expect("defaults can be read"))
    }
}

fn trimmed(value: &OsStr) -> &[u8] {
    value.as_encoded_bytes().trim_ascii()
}
