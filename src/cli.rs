//! The commands: which one runs, with its parts put together, and its exit code.

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use clap::error::ErrorKind;
use clap_complete::Shell;
use tokio::sync::Notify;

use crate::balena::{Client, Failure, Query};
use crate::discovery::inventory::Inventory;
use crate::discovery::target_file::TargetFile;
use crate::discovery::{Clock, Discovery, Published, Sink, StandardOutput};
use crate::early_messages::{exit_code, misconfigured, print, without_key};
use crate::liveness::Liveness;
use crate::logging;
use crate::net::CannotStart;
use crate::signals::{self, Event};
use crate::status::Status;
use crate::status::health_command::{self, Unhealthy};
use crate::systemd;
use crate::{check, config, tunnel};

/// How long another process may hold the target file at the start.
const LOCK_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a refresh, or `check`, may go on after a signal to stop.
const STOP_GRACE: Duration = Duration::from_millis(500);

/// Runs the program with these arguments, of which the first is its name, and the environment of the process.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<_> = args.into_iter().collect();
    if let Some(mistake) = config::mistake(&args) {
        print(&format!("{mistake}\nbaletheus --help lists all options"));
        return ExitCode::from(2);
    }
    let matches = match config::command().try_get_matches_from(args) {
        Ok(matches) => matches,
        Err(message) => {
            let plain = message.to_string();
            if without_key(&plain) == plain {
                let _ = message.print(); // standard output may be closed
            } else {
                let _ = write!(io::stderr(), "{}", without_key(&plain));
            }
            if message.kind() == ErrorKind::ArgumentConflict && plain.contains("the subcommand") {
                print("options go behind the command, such as: baletheus check --fleet acme/gateways");
            }
            return ExitCode::from(u8::try_from(message.exit_code()).unwrap_or(2));
        }
    };
    let var = |name: &str| std::env::var_os(name);
    let misspelt = config::misspelt(std::env::vars_os().map(|(name, _)| name));
    if matches!(matches.subcommand_name(), None | Some("tunnel")) {
        signals::outlive_hangup();
    }
    let code = match matches.subcommand() {
        Some(("completions", matches)) => return completions(matches.get_one::<String>("shell")),
        Some(("health", matches)) => {
            let listen = var("LISTEN_ADDRESS").and_then(|listen| listen.into_string().ok());
            let ask = |_| health(matches.get_one("url").map(String::as_str), listen.as_deref());
            Ok(end_on_stop(Duration::ZERO, ask))
        }
        Some(("tunnel", matches)) => config::tunnel(matches, &var).map(|mut settings| {
            settings.log.warnings.extend(misspelt.clone());
            let Err(error) = tunnel::run(settings);
            cannot_start(&error)
        }),
        Some(("check", matches)) => config::check(matches, &var).map(|mut settings| {
            settings.log.warnings.extend(misspelt.clone());
            end_on_stop(STOP_GRACE, |stop| match check::run(settings, stop) {
                Ok(true) => ExitCode::SUCCESS,
                Ok(false) => ExitCode::FAILURE,
                Err(error) => cannot_start(&error),
            })
        }),
        _ => config::discovery(&matches, &var).map(|mut settings| {
            settings.log.warnings.extend(misspelt.clone());
            discover(settings).unwrap_or_else(|error| cannot_start(&error))
        }),
    };
    let code = code.unwrap_or_else(|errors| misconfigured(matches.subcommand_name(), &errors, &misspelt));
    log::logger().flush();
    code
}

/// Logs why the system does not let the program start, and gives the exit code.
fn cannot_start(why: &CannotStart) -> ExitCode {
    log::error!("cannot start: {why}");
    exit_code(why.may_pass())
}

fn completions(shell: Option<&String>) -> ExitCode {
    let Some(shell) = shell.and_then(|shell| shell.parse::<Shell>().ok()) else { return ExitCode::from(2) };
    // The generator panics if it cannot write.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut config::completed(), "baletheus", &mut script);
    let Err(error) = io::stdout().write_all(&script) else { return ExitCode::SUCCESS };
    print(&format!("cannot write to standard output: {error}"));
    ExitCode::FAILURE
}

fn health(url: Option<&str>, listen: Option<&str>) -> ExitCode {
    let Err(error) = health_command::ask(url, listen) else { return ExitCode::SUCCESS };
    print(&error.to_string());
    match error {
        Unhealthy::NoUrl | Unhealthy::BadUrl => ExitCode::from(2),
        _ => ExitCode::FAILURE,
    }
}

/// Runs a command that ends at a signal to stop, after this grace at the latest. As PID 1 of a container it would otherwise
/// ignore the signals.
fn end_on_stop(grace: Duration, run: impl FnOnce(Arc<Notify>) -> ExitCode) -> ExitCode {
    let stop = Arc::new(Notify::new());
    let stopped = stop.clone();
    let notify = move |event| {
        if event == Event::Stop {
            stopped.notify_one();
        }
    };
    match signals::handle(grace, 1, notify) {
        Ok(()) => run(stop),
        Err(error) => {
            print(&format!("cannot start: {error}"));
            exit_code(error.may_pass())
        }
    }
}

fn discover(config: config::DiscoverySettings) -> Result<ExitCode, CannotStart> {
    logging::init(&config.log, &config.api.key);
    let mut file = TargetFile::new(config.sd_file.clone(), config.sd_file_mode, config.write_empty);
    let interval = config.refresh;
    let (wake, woken) = channel();
    let mut clock = Wakeups::start(interval.is_none(), wake)?;
    log_start(&config, &if config.dry_run { StandardOutput.name() } else { file.name() });
    if !config.dry_run {
        match lock(&mut file, &mut clock) {
            Ok(false) => return Ok(if interval.is_some() { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::AlreadyExists) => {
                log::error!("{}", file.failure(&error));
                return Ok(ExitCode::from(2));
            }
            // Other errors may pass. Each refresh reports them.
            Ok(true) | Err(_) => {}
        }
    }
    let query = Query::new(config.rules.fields(), &config.selection);
    let mut client = Client::new(config.api, query)?;
    let has_status = interval.is_some() && !config.status.listen.is_empty();
    let stored = has_status.then(|| file.stored()).flatten();
    let sink: &mut dyn Sink = if config.dry_run { &mut StandardOutput } else { &mut file };
    let liveness = Arc::new(Liveness::start());
    let status = if has_status {
        Some(Status::start(config.status, &mut client, liveness.clone(), stored, woken)?)
    } else {
        None
    };
    systemd::watch(liveness.clone())?;
    // This does not wait for the first refresh: while the API is down, the targets of the last run are in the file.
    systemd::ready();
    client.liveness = Some(liveness.clone());
    let report = |took: Duration, outcome: &Result<Published, Failure>, list: &Inventory| {
        systemd::refreshed(outcome);
        if let Some(status) = &status {
            status.refreshed(took, outcome, list);
        }
    };
    let discovery = Discovery::new(&mut client, sink, &report, &liveness, config.rules, config.selection.fleets);
    Ok(if discovery.run(interval, &mut clock) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Locks the target file. The process before this one may need a moment to end. False if a signal ends the wait.
fn lock(file: &mut TargetFile, clock: &mut Wakeups) -> io::Result<bool> {
    let deadline = Instant::now() + LOCK_TIMEOUT;
    let mut is_waiting = false;
    loop {
        match file.lock() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                if !is_waiting {
                    let timeout = humantime::format_duration(LOCK_TIMEOUT);
                    log::info!("another baletheus writes {}: waiting {timeout} at most for its end", file.name());
                    is_waiting = true;
                }
                if !clock.wait(Instant::now() + Duration::from_millis(100)) {
                    return Ok(false);
                }
            }
            result => return result.map(|()| true),
        }
    }
}

/// One line about what is going to happen.
fn log_start(config: &config::DiscoverySettings, list: &str) {
    let version = env!("CARGO_PKG_VERSION");
    let api = &config.api.url;
    let address = config.rules.address.as_str();
    let how_often = match config.refresh {
        Some(interval) => format!("every {}", humantime::format_duration(interval)),
        None => "once".into(),
    };
    log::info!("baletheus {version}: devices of {api} to {list}, address {address}, {how_often}");
}

/// Time that passes, and signals that cut a wait short.
struct Wakeups(Receiver<Event>);

impl Wakeups {
    /// Handles signals from now on. After a signal to stop, a refresh has [`STOP_GRACE`] to finish; the target file is whole at
    /// every moment. A single refresh (`once`) that is stopped ends with exit code 1.
    /// `wake` is sent each SIGHUP, too.
    fn start(once: bool, wake: Sender<()>) -> Result<Self, CannotStart> {
        let (sender, receiver) = channel();
        signals::handle(STOP_GRACE, i32::from(once), move |event| {
            if event == Event::Reload {
                systemd::reloading();
                let _ = wake.send(()); // it fails without a status endpoint
            }
            let _ = sender.send(event); // it fails if nobody receives: the program is about to end
        })?;
        Ok(Wakeups(receiver))
    }
}

impl Clock for Wakeups {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn wait(&mut self, until: Instant) -> bool {
        match self.0.recv_timeout(until.saturating_duration_since(Instant::now())) {
            // Those that came meanwhile ask for the same refresh.
            Ok(event) => event == Event::Reload && self.0.try_iter().all(|event| event == Event::Reload),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => true,
        }
    }
}
