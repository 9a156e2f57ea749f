//! The command line: its help, and words that are explained better than by the library.

use std::ffi::OsString;

use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgAction, Command, ValueHint};

use super::options::{OPTIONS, Opt, Verb};
use crate::values::boolean;

/// The width of the help, where the terminal is not narrower.
const MAX_WIDTH: usize = 80;
/// The options that the short help has.
const SHORT_HELP: [&str; 13] = [
    "api-key-file",
    "fleet",
    "tag",
    "online-only",
    "address",
    "exporter",
    "sd-file",
    "refresh",
    "oneshot",
    "dry-run",
    "listen",
    "device-metrics",
    "tunnel-url",
];
/// What a key is called by those who look for its flag.
const KEY_FLAGS: [&str; 6] = ["--api-key", "--apikey", "--api_key", "--key", "--token", "--api-token"];

const DISCOVER_EXAMPLES: &str = "\
Examples:
  Show the list, and touch no file:
    baletheus --api-key-file balena.key --dry-run --fleet acme/gateways
  Keep the target file up to date, with metrics and a page for people:
    baletheus --api-key-file balena.key --exporter node:9100 --listen :9797
";
const CHECK_EXAMPLES: &str = "\
Examples:
  Why does this device not show up?
    baletheus check fridge-01
  Which targets fail?
    baletheus check --failing
  What to paste into an issue:
    baletheus check --report
";
const TUNNEL_EXAMPLES: &str = "\
Example:
  With proxy_url: http://127.0.0.1:9798 in Prometheus' configuration:
    baletheus tunnel --api-key-file balena.key --sd-file balena.json
";

const DISCOVER_CODES: &str = "Exit codes: 0 ended by a signal or done, 1 the single refresh failed or was stopped, or a later \
    start may succeed (a port in use, a file not mounted yet), 2 the configuration is wrong, or another baletheus writes the file.";
const CHECK_CODES: &str = "Exit codes: 0 every target that should answer does, 1 one does not, there is no device, or the API \
    fails, 2 the configuration is wrong.";
const TUNNEL_CODES: &str = "Exit codes: 0 ended by a signal, 1 a later start may succeed (a port in use, a file not mounted \
    yet), 2 the configuration is wrong.";

pub fn command() -> Command {
    let check = Command::new("check")
        .about("Tries each target as Prometheus would and reports why one does not answer")
        .after_help(CHECK_CODES)
        .after_long_help(after_help(Verb::Check, CHECK_EXAMPLES, CHECK_CODES))
        .arg(
            Arg::new("name")
                .value_name("NAME")
                .help("only devices with this in their name, or at the start of their uuid"),
        )
        .arg(switch("failing", "show only what fails"))
        .arg(switch("json", "print a JSON array of objects"))
        .arg(
            switch("report", "print a report for an issue, without names, uuids and keys")
                .conflicts_with_all(["json", "failing"]),
        )
        .args(flags(Verb::Check));
    let tunnel = Command::new("tunnel")
        .about("Proxies Prometheus' scrapes of vpn targets through balena's VPN: its URL is Prometheus' proxy_url")
        .after_help(TUNNEL_CODES)
        .after_long_help(after_help(Verb::Tunnel, TUNNEL_EXAMPLES, TUNNEL_CODES))
        .args(flags(Verb::Tunnel));
    let health = Command::new("health")
        .about("Asks a running sidecar whether it is healthy, for a container's HEALTHCHECK")
        .after_help("Exit codes: 0 healthy, 1 not healthy or no answer, 2 no usable URL.")
        .arg(
            Arg::new("url")
                .value_name("URL")
                .help("its status endpoint, such as http://127.0.0.1:9797 [default: from LISTEN_ADDRESS]"),
        );
    let completions = Command::new("completions")
        .about("Prints the completions of a shell, for its folder of completions")
        .arg(Arg::new("shell").value_name("SHELL").required(true).value_parser(["bash", "elvish", "fish", "zsh"]));
    Command::new("baletheus")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Finds every device of a balena fleet and keeps Prometheus' target file up to date")
        .max_term_width(MAX_WIDTH)
        .after_help("The key comes from API_KEY or --api-key-file. --help lists all options and variables.")
        .after_long_help(after_help(Verb::Discover, DISCOVER_EXAMPLES, DISCOVER_CODES))
        .args(flags(Verb::Discover))
        .args_conflicts_with_subcommands(true)
        .subcommands([check, health, tunnel, completions])
}

/// The command line with all values that a shell can complete.
pub fn completed() -> Command {
    let words = |arg: Arg| match OPTIONS.iter().find(|opt| opt.flag == arg.get_id().as_str()).map(Opt::words) {
        Some(words) if !words.is_empty() => arg.value_parser(PossibleValuesParser::new(words)),
        _ => arg,
    };
    ["check", "tunnel"].into_iter().fold(command().mut_args(words), |command, name| {
        command.mut_subcommand(name, |subcommand| subcommand.mut_args(words))
    })
}

/// What is wrong with these arguments, where clap would name something else.
pub fn mistake(args: &[OsString]) -> Option<String> {
    let args: Vec<_> = args.iter().map(|arg| arg.to_string_lossy()).take_while(|arg| arg != "--").collect();
    let name = |arg: &str| arg.split('=').next().unwrap_or_default().to_owned();
    if let Some(arg) = args.iter().find(|arg| KEY_FLAGS.contains(&&*name(arg))) {
        let flag = name(arg);
        return Some(format!("there is no {flag}, since the process list shows flags: set API_KEY, or --api-key-file"));
    }
    let is_switch = |arg: &str| {
        let flag = arg.strip_prefix("--").unwrap_or_default();
        OPTIONS.iter().any(|opt| opt.is_boolean() && opt.flag == flag && !flag.is_empty())
    };
    let stray = args.windows(2).find(|pair| is_switch(&pair[0]) && boolean(&pair[1]).is_ok())?;
    Some(format!("{} is a switch: write {}={}, or leave {:?} out", stray[0], stray[0], stray[1], stray[1]))
}

/// The files that these arguments name as that of the key.
pub fn key_files(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    const FLAG: &str = "--api-key-file";
    let args: Vec<_> = args.collect();
    let next = args.windows(2).filter(|pair| pair[0] == FLAG).map(|pair| pair[1].clone());
    let joined = args.iter().filter_map(|arg| arg.to_str()?.strip_prefix(FLAG)?.strip_prefix('='));
    next.chain(joined.map(OsString::from)).collect()
}

fn switch(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).action(ArgAction::SetTrue).help(help)
}

fn flags(verb: Verb) -> impl Iterator<Item = Arg> {
    OPTIONS
        .iter()
        .filter(move |opt| opt.verbs.contains(&verb) && !opt.flag.is_empty())
        .flat_map(move |opt| flag(verb, opt))
}

/// The flag of an option, and the one that switches it off.
fn flag(verb: Verb, opt: &'static Opt) -> impl Iterator<Item = Arg> {
    // `check` takes these only so that the options of discovery can stay on its line.
    let is_unused = verb == Verb::Check
        && ["sd-file", "refresh", "oneshot", "dry-run", "listen", "device-metrics"].contains(&opt.flag);
    let is_minor = is_unused || !SHORT_HELP.contains(&opt.flag);
    let short = if opt.is_boolean() { opt.short.to_owned() } else { format!("{}{}", opt.short, default(opt)) };
    let arg = Arg::new(opt.flag)
        .long(opt.flag)
        .help(short)
        .long_help(long_help(opt))
        .help_heading(opt.group)
        .hide_short_help(is_minor);
    let arg = match opt.value.trim_end_matches(",…") {
        "" => arg.value_name("BOOL").num_args(0..=1).require_equals(true).default_missing_value("true"),
        value => arg.value_name(value).action(if value == opt.value { ArgAction::Set } else { ArgAction::Append }),
    };
    let arg = if opt.value == "PATH" { arg.value_hint(ValueHint::FilePath) } else { arg };
    let negative = opt.negative().map(|name| {
        let help = format!("the same as --{}=false", opt.flag);
        Arg::new(name)
            .long(name)
            .action(ArgAction::SetTrue)
            .help(help)
            .help_heading(opt.group)
            .hide_short_help(is_minor)
            .overrides_with(opt.flag)
    });
    [Some(arg), negative].into_iter().flatten()
}

fn long_help(opt: &Opt) -> String {
    let more = if opt.more.is_empty() { String::new() } else { format!(". {}", opt.more.trim_end_matches('.')) };
    let takes = if opt.is_boolean() { String::new() } else { format!(" [takes: {}]", opt.takes) };
    format!("{}{more}{takes} [env: {}]{}", opt.short, opt.vars.join(", "), default(opt))
}

fn after_help(verb: Verb, examples: &str, codes: &str) -> String {
    let variables = OPTIONS.iter().filter(|opt| opt.flag.is_empty() && opt.verbs.contains(&verb));
    let lines: Vec<_> = variables.map(|opt| format!("  {:<16} {}{}", opt.vars[0], opt.short, default(opt))).collect();
    format!(
        "Variables without a flag:\n{}\n\nA flag beats its variable; an empty variable counts as not set.\n\n{examples}\n{codes}",
        lines.join("\n")
    )
}

fn default(opt: &Opt) -> String {
    // A blank behind each comma, so that a long list is broken there.
    if opt.default.is_empty() { String::new() } else { format!(" [default: {}]", opt.default.replace(',', ", ")) }
}
