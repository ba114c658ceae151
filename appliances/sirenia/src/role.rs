//! Which role a state gives to a peer.

use flynn_api::discovery::Instance;
use flynn_api::sirenia::{Role, State};

/// The role of the peer whose `label` has the value `id`.
pub fn role_of(state: &State, label: &str, id: &str) -> Role {
    let is = |instance: &Instance| instance.meta.get(label).is_some_and(|value| value == id);
    if is(&state.primary) {
        Role::Primary
    } else if state.sync.as_ref().is_some_and(is) {
        Role::Sync
    } else if state.asyncs.iter().any(is) {
        Role::Async
    } else if state.deposed.iter().any(is) {
        Role::Deposed
    } else {
        Role::Unassigned
    }
}
