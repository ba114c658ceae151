//! The shell around the state machine: everything that happens goes in, everything that is to be done goes out.

use std::sync::Arc;
use std::time::Duration;

use flynn_api::sirenia::PeerStatus;
use flynn_sirenia::{Action, Config, Event, Machine, Role};
use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::database::Database;
use crate::discovery::Discovery;
use crate::options::IDENTITY_LABEL;
use crate::status::{self, Board};
use crate::user::User;
use crate::volume::Volume;
use crate::{Error, Options};

/// Events that wait to be told to the state machine. Whoever has one more waits.
const QUEUE: usize = 64;

/// Runs the appliance until `shutdown`, or until it is told to stop; then the database is down.
pub async fn run(options: Options, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
    let options = Arc::new(options);
    let user = User::find()?;
    let mut shutdown = std::pin::pin!(shutdown);
    let volume = tokio::select! {
        volume = Volume::open(&options.data, &user) => volume?,
        () = &mut shutdown => return Ok(()),
    };
    let id = volume.id.clone();
    tracing::info!(peer = %id, address = %options.address, "this peer");
    let me = options.instance(&id);
    let discovery = Discovery::new(&options, me.clone())?;
    let config = Config {
        label: IDENTITY_LABEL,
        me,
        zero: "0/0".into(),
        initialised: volume.has_database(),
    };
    let database = Database::new(volume, user, Arc::clone(&options));
    let stop = CancellationToken::new();
    let _guard = stop.clone().drop_guard();

    let (events, inbox) = mpsc::channel(QUEUE);
    let (roles, outbox) = mpsc::channel(1);
    let (seen, board) = watch::channel(PeerStatus {
        id,
        role: Role::None,
        state: None,
        problem: None,
    });
    let board = Board::new(board, database.handle(), &options.password, stop.clone());
    let status = status::listen(&options).await?;
    let status = tokio::spawn(status::serve(status, board, stop.clone()));
    let database = tokio::spawn(database.run(outbox, events.clone(), stop.clone()));
    let peer = Peer {
        machine: Machine::new(config),
        discovery: discovery.clone(),
        roles,
        events: events.clone(),
        seen,
    };

    tokio::select! {
        () = peer.work(inbox) => {}
        () = discovery.stay_registered() => {}
        () = discovery.watch(&events) => {}
        () = &mut shutdown => {}
        () = stop.cancelled() => {}
    }
    discovery.deregister().await;
    stop.cancel();
    // Both end by themselves now; a panic in one has been reported already.
    let _ = database.await;
    let _ = status.await;
    Ok(())
}

struct Peer {
    machine: Machine,
    discovery: Discovery,
    roles: mpsc::Sender<Role>,
    events: mpsc::Sender<Event>,
    seen: watch::Sender<PeerStatus>,
}

impl Peer {
    /// Tells the machine what happens, for ever.
    async fn work(mut self, mut inbox: mpsc::Receiver<Event>) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let event = tokio::select! {
                Some(event) = inbox.recv() => event,
                _ = tick.tick() => Event::Tick,
            };
            for action in self.machine.handle(Timestamp::now(), event) {
                self.act(action).await;
            }
            self.publish();
        }
    }

    async fn act(&self, action: Action) {
        match action {
            Action::Write {
                state,
                replaces,
                leader,
            } => {
                let (discovery, events) = (self.discovery.clone(), self.events.clone());
                tokio::spawn(async move {
                    let outcome = discovery.write(&state, replaces, leader).await;
                    // Nobody listens any more only when all is ending.
                    let _ = events.send(Event::Written(outcome)).await;
                });
            }
            // The machine waits for the answer before it asks again: there is always room.
            Action::Reconfigure(role) => {
                let _ = self.roles.send(role).await;
            }
        }
    }

    fn publish(&self) {
        let (role, state) = (self.machine.role(), self.machine.state());
        let problem = self.machine.problem().map(|problem| problem.to_string());
        self.seen.send_if_modified(|seen| {
            let changed = seen.role != role || seen.state.as_ref() != state || seen.problem != problem;
            if changed {
                if seen.role != role {
                    tracing::info!(from = ?seen.role, to = ?role, "role");
                }
                if let Some(problem) = problem.as_ref().filter(|_| seen.problem != problem) {
                    tracing::warn!("{problem}");
                }
                (seen.role, seen.state, seen.problem) = (role, state.cloned(), problem);
            }
            changed
        });
    }
}
