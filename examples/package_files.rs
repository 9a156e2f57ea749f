//! Writes the files of a package that follow from the command line and the table of options: manual pages, completions of shells,
//! and `/etc/default/baletheus`. `scripts/release/deb` runs it: `cargo run --example package_files -- FOLDER`.

use std::fs;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use baletheus::config::{OPTIONS, Opt, Verb, command, completed};
use clap_complete::{Shell, generate_to};

/// What the units of systemd set, so that the file shows these values and not the program's own.
const UNITS: &[(&str, &str)] =
    &[("SD_FILE_PATH", "/var/lib/baletheus/balena.json"), ("LISTEN_ADDRESS", "127.0.0.1:9797")];
/// The units take the key as a credential. A second one would be a mistake in the configuration.
const KEY: &[&str] = &["API_KEY", "API_KEY_FILE"];
/// They end the program after one refresh, so they are of no use to a service.
const ONCE: &[&str] = &["ONESHOT", "DRY_RUN"];

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [folder] = arguments.as_slice() else {
        eprintln!("usage: cargo run --example package_files -- FOLDER");
        return ExitCode::from(2);
    };
    match write(Path::new(folder)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cannot write to {folder}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn write(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    clap_mangen::generate_to(command(), folder)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut completed(), "baletheus", folder)?;
    }
    fs::write(folder.join("baletheus.default"), defaults())
}

/// Every setting of both services, commented out.
fn defaults() -> String {
    let mut text = String::from(
        "# Settings of baletheus.service and baletheus-tunnel.service. After a change:\n\
         #   systemctl restart baletheus baletheus-tunnel\n\
         # Each line shows the value that applies without it. An empty value counts as not set.\n\
         #\n\
         # The API key is not here. It is the content of /etc/baletheus/api-key:\n\
         #   install -m 600 /dev/null /etc/baletheus/api-key && editor /etc/baletheus/api-key\n",
    );
    let mut group = "";
    for opt in OPTIONS.iter().filter(|opt| is_setting(opt)) {
        if opt.group != group {
            group = opt.group;
            text += &format!("\n## {group}\n");
        }
        let value = UNITS.iter().find(|(name, _)| *name == opt.vars[0]).map_or(opt.default, |(_, value)| value);
        text += &format!("\n# {}\n#{}={value}\n", comment(opt), opt.vars[0]);
    }
    text
}

fn comment(opt: &Opt) -> String {
    format!("{}; it takes: {}", opt.short, opt.takes)
}

fn is_setting(opt: &Opt) -> bool {
    let is_of_services = opt.verbs.contains(&Verb::Discover) || opt.verbs.contains(&Verb::Tunnel);
    is_of_services && !KEY.contains(&opt.vars[0]) && !ONCE.contains(&opt.vars[0])
}
