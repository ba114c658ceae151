//! What the scheduler says of itself: `GET /.well-known/status` and `GET /debug/state`.

use std::sync::Arc;

use axum::Router;
use axum::routing::get;
use flynn_api::server::Json;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::lead::{self, Lead};
use crate::shared::Shared;
use crate::view::State;

type Leads = watch::Receiver<Option<Lead>>;

pub(crate) fn router(shared: Arc<Shared>, leads: Leads) -> Router {
    let state = Arc::clone(&shared);
    let acts = leads.clone();
    Router::new()
        .route(
            "/.well-known/status",
            get(async move || Json(status(&shared, &leads))),
        )
        .route("/debug/state", get(async move || Json(debug(&state, &acts))))
}

fn status(shared: &Shared, leads: &Leads) -> Value {
    let controller = shared.desired(|desired| desired.fresh);
    let hosts = shared.view(|view| view.hosts().values().filter(|host| host.is_ready()).count());
    json!({
        "status": "healthy",
        "detail": {
            "leader": lead::current(leads).is_some(),
            "controller": controller,
            "hosts": hosts,
            "blocked": shared.plan(|plan| plan.blocked.len()),
        },
    })
}

fn debug(shared: &Shared, leads: &Leads) -> Value {
    let formations = shared.desired(|desired| {
        let formation = |formation: &flynn_api::controller::ExpandedFormation| {
            json!({
                "app": formation.app.name,
                "release": formation.release.id,
                "processes": formation.processes,
                "generation": formation.generation,
            })
        };
        json!({
            "as_of": desired.as_of,
            "fresh": desired.fresh,
            "list": desired.formations.values().map(formation).collect::<Vec<_>>(),
        })
    });
    let hosts = shared.view(|view| {
        let host = |(id, host): (&String, &crate::view::Host)| {
            let job = |(id, job): (&String, &crate::view::Job)| {
                json!({
                    "id": id,
                    "key": job.key,
                    "state": job.state,
                    "asked_to_stop": job.asked_to_stop,
                    "restarts": job.restarts,
                    "replaces": job.replaces,
                })
            };
            json!({
                "id": id,
                "registered": host.registered,
                "answering": host.answering,
                "listed": host.listed,
                "shutting_down": host.shutting_down,
                "facts": host.facts,
                "over": host.jobs.values().filter(|job| job.state == State::Down).count(),
                "jobs": host.jobs.iter().filter(|(_, job)| job.state != State::Down).map(job).collect::<Vec<_>>(),
            })
        };
        view.hosts().iter().map(host).collect::<Vec<_>>()
    });
    json!({
        "lead": lead::current(leads).map(|lead| lead.index),
        "formations": formations,
        "hosts": hosts,
        "last_plan": shared.plan(|plan| plan.clone()),
        "reports": shared.outbox(|outbox| json!({ "waiting": outbox.len(), "dropped": outbox.dropped })),
    })
}
