//! The program: puts the parts together and turns what comes of them into an exit code.

use std::ffi::{OsString, c_int};
use std::io::{self, Write};
use std::process::{self, ExitCode};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::Signals;
use signal_hook::low_level::signal_name;

use crate::balena::client::Balena;
use crate::balena::failure::{Failure, Published};
use crate::balena::query::Query;
use crate::check;
use crate::config::options;
use crate::config::{self, Config};
use crate::discovery::changes::warn_of_a_devices_key;
use crate::discovery::inventory::{Entry, Inventory};
use crate::discovery::target_file::{self as registry, Registry};
use crate::discovery::{Clock, Discovery, Sink};
use crate::logging::{self, cannot_start, misconfigured};
use crate::status::device_metrics as vitals;
use crate::status::health;
use crate::status::liveness::Pulse;
use crate::status::{self, Status};
use crate::tunnel;

/// How long a refresh may go on after a signal to stop, before it is cut short.
const GRACE: Duration = Duration::from_millis(500);

/// Runs the program with these arguments, of which the first is its name, and the environment of the process.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let command = options::command().subcommands([check::command(), health::command(), tunnel::command()]);
    let matches = match command.try_get_matches_from(args) {
        Ok(matches) => matches,
        Err(told) => {
            let _ = told.print(); // standard output may be closed
            return ExitCode::from(u8::try_from(told.exit_code()).unwrap_or(2));
        }
    };
    let var = |name: &str| std::env::var_os(name);
    if let Some(("health", matches)) = matches.subcommand() {
        return health::ask(matches.get_one::<String>("url").cloned(), var("LISTEN_ADDRESS"));
    }
    if let Some(("tunnel", matches)) = matches.subcommand() {
        return tunnel::run(matches.clone(), &var);
    }
    let (matches, check) = match matches.subcommand() {
        Some(("check", matches)) => (matches.clone(), Some(matches.get_flag("json"))),
        _ => (matches, None),
    };
    match config::read(matches, &var) {
        Ok(config) => match check {
            None => run(config),
            Some(json) => check::run(config, json),
        },
        Err(errors) => misconfigured(&errors),
    }
}

fn run(config: Config) -> ExitCode {
    logging::init(&config.log);
    let mut registry = Registry::new(config.sd_file, config.sd_file_mode, config.write_empty);
    if let Err(error) = if config.dry_run { Ok(()) } else { registry.lock() } {
        // anything else may pass, and is told at each refresh
        if error.kind() == io::ErrorKind::WouldBlock {
            log::error!("{}", registry.failed(&error).message);
            return ExitCode::from(2);
        }
    }
    let sink: &mut dyn Sink = if config.dry_run { &mut StandardOutput } else { &mut registry };
    let (version, api, name) = (env!("CARGO_PKG_VERSION"), &config.api.url, sink.name());
    let address = format!("{:?}", config.rules.address).to_lowercase();
    let every = |interval| format!("every {}", humantime::format_duration(interval));
    let how = config.refresh.map_or("once".into(), every);
    log::info!("baletheus {version}: devices of {api} to {name}, address {address}, {how}");
    for warning in &config.warnings {
        log::warn!("{warning}");
    }
    let pulse = Arc::new(Pulse::start());
    let query = Query::new(&config.fleets, &config.rules);
    let started = Balena::new(config.api, query).and_then(|balena| {
        let signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGXFSZ]).map_err(|error| format!("signals: {error}"))?;
        Ok((balena, Wakeups::listen(signals, config.refresh.is_none(), pulse.clone())))
    });
    let (mut balena, mut clock) = match started {
        Ok(started) => started,
        Err(error) => return cannot_start(&error),
    };
    let (looping, listening) = (config.refresh.is_some(), !config.status.listen.is_empty());
    let status = match (looping && listening).then(|| Status::listen(&config.status.listen, pulse)).transpose() {
        Ok(status) => status,
        Err(error) => return cannot_start(&format!("{error}; set another --listen (LISTEN_ADDRESS)")),
    };
    warn_of_a_devices_key(&mut balena);
    let succeeded = if let Some(status) = status {
        vitals::watch(balena.clone(), &config.status, status.clone());
        let (mut source, mut recorder) = status::around(&mut balena, status);
        let mut observer = |took, outcome: &_, list: &_| recorder.refreshed(took, outcome, list);
        Discovery::new(&mut source, sink, &mut observer, config.rules, config.fleets).run(config.refresh, &mut clock)
    } else {
        let mut nobody = |_, _: &_, _: &_| ();
        Discovery::new(&mut balena, sink, &mut nobody, config.rules, config.fleets).run(config.refresh, &mut clock)
    };
    if succeeded { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Time that passes, and signals that cut it short.
struct Wakeups {
    signals: Receiver<c_int>,
    pulse: Arc<Pulse>,
}

impl Wakeups {
    /// Signals have a thread of their own, so that one to stop is heard in the midst of a request too: what goes on
    /// has a moment to end, and is then cut short. The target file is whole at every moment.
    fn listen(mut from: Signals, once: bool, pulse: Arc<Pulse>) -> Self {
        let (sender, signals) = channel();
        thread::spawn(move || {
            // a file that may not grow is told when the write fails
            for signal in from.forever().filter(|signal| *signal != SIGXFSZ) {
                if signal != SIGHUP {
                    // first, since whoever is told may end the program at once
                    log::info!("stopped by {}", signal_name(signal).unwrap_or("a signal"));
                }
                let _ = sender.send(signal); // nobody listens: the program is about to end
                if signal != SIGHUP {
                    thread::sleep(GRACE);
                    process::exit(i32::from(once));
                }
            }
        });
        Wakeups { signals, pulse }
    }
}

impl Clock for Wakeups {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn wait(&mut self, until: Instant) -> bool {
        self.pulse.expect(until);
        match self.signals.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(signal) => signal == SIGHUP,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => true,
        }
    }
}

/// The sink of a dry run.
struct StandardOutput;

impl Sink for StandardOutput {
    fn name(&self) -> String {
        "standard output".into()
    }

    fn held(&self) -> Option<Vec<Arc<Entry>>> {
        None
    }

    fn publish(&mut self, list: &Inventory) -> Result<Published, Failure> {
        let mut out = io::stdout().lock();
        let written = registry::parts(list.texts()).try_for_each(|part| out.write_all(part)).and_then(|()| out.flush());
        written.map_err(|error| Failure::new("write", format!("cannot write the list to standard output: {error}")))?;
        Ok(Published::Written)
    }
}
